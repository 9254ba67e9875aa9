"""The `gamma` command. One file a verb: it parses, calls one function of the package, and prints."""
