"""Read the files that torch.save writes without importing torch and without running their pickle.

torch.load would need torch, whose import takes seconds and hundreds of MB, while `t5tune export` starts in a fraction
of a second and needs little more memory than the adapter. Plain unpickling would run whatever code an untrusted file
asks for; torch's weights_only mode wouldn't, but a crafted file could still make it use any amount of memory. So
`zip.py` reads the archive and refuses any in which two zip readers could see different members, `pickle.py` is an
interpreter for only the opcodes that torch writes, which imports nothing and calls only the functions that it is given,
and `file.py` builds tensors from both, as views of the memory-mapped file. Memory stays bounded whatever a file claims:
the central directory, the pickle's length and the number of its opcodes are limited, and every size is checked against
the file's.
"""
