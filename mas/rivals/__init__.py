"""Methods of today beside MAS, one file each: rules from outside `mas_core` (`config.RULES`)."""
