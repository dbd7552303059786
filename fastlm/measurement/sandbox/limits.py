"""What one isolated program may use, and how both sides of the isolation talk: values only, no imports.

Read by the package and, by path, by the scripts that run inside.
"""

PROCESSES = 16  # of the program and its threads; some kernels count the two processes that watch over it too
FILE_BYTES = 16 << 20  # of each file, and of what is printed
FOLDER_BYTES = 64 << 20  # of the private folder, which is memory
FOLDER_FILES = 4096
OPEN_FILES = 64
FOLDER = "/tmp"
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
NOBODY = 65534

TOKEN_BYTES = 32
EXITED = 100  # exit status of the isolation: EXITED + the signal that ended the program, 0 if none did
SHOWN_CHARACTERS = 300
