"""The steps of the data flow, from a request to a result: what each verb of the command line calls."""
