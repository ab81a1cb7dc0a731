"""The server of `t5tune serve`: an HTTP interface, a queue that makes batches, and engines that compute replies."""
