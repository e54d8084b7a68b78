"""Rivals of MAS, one file each: what a client or the server does differently from FedAvg.

`config.RULES` is their table. None is named in `mas_core`'s training; a rule of your own is named
by where it is imported from: `fl.method="my_module:MyRule"`, a subclass of `fedavg.FedAvg`.
"""
