"""What a client or the server does differently from plain federated averaging: one file a method.

`config.RULES` is their table. A rule outside the package is named by where it is imported from:
`fl.method="my_module:MyRule"`, a subclass of `fedavg.FedAvg`.
"""
