"""Read records of many formats from files, folders, the network and standard input."""
