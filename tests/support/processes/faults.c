/* Loaded by LD_PRELOAD: makes the Nth file operation below a folder fail like a system error, counted over a whole
 * tree of processes. FAULTS names a file that contains `struct control`; see forks.py, which compiles this.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NEVER, ONCE, FROM_THEN_ON, SHORT };

struct control {
    long count;    /* operations so far */
    long at;       /* the number of the one that fails, from 1 */
    int mode;
    int error;     /* its errno */
    char folder[4096];
    char trace[4096]; /* file to which each operation appends a line "NUMBER KIND PATH" */
};

static struct control *control;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS");
    int file = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (found != MAP_FAILED) control = found;
}

/* Decide about the next operation: 0 to do it, an errno to fail with, or -1 to write only half of the bytes. */
static int decide(const char *kind, const char *path) {
    if (!control || !path || !*control->folder) return 0;
    size_t length = strlen(control->folder);
    if (strncmp(path, control->folder, length) || (path[length] && path[length] != '/')) return 0;
    long number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    int hit = (control->mode == ONCE || control->mode == SHORT) ? number == control->at
            : control->mode == FROM_THEN_ON && number >= control->at;
    char line[PATH_MAX + 64];
    int size = snprintf(line, sizeof line, "%ld %s %s\n", number, kind, path);
    int trace = syscall(SYS_openat, AT_FDCWD, control->trace, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (trace >= 0) {
        syscall(SYS_write, trace, line, size);
        syscall(SYS_close, trace);
    }
    if (!hit) return 0;
    if (control->mode == SHORT) return strcmp(kind, "write") ? 0 : -1;
    return control->error;
}

static int decide_for_file(const char *kind, int file) {
    char link[64], path[PATH_MAX];
    if (!control) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = before;
    path[size < 0 ? 0 : size] = 0;
    return decide(kind, path);
}

#define FAIL_BY(found) do { int number_ = (found); if (number_ > 0) { errno = number_; return -1; } } while (0)

static int opened(int folder, const char *path, int flags, mode_t mode) {
    if ((flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT) FAIL_BY(decide("open", path));
    return syscall(SYS_openat, folder, path, flags, mode);
}

#define MODE(last) mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list more; va_start(more, last); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static FILE *stream(const char *name, const char *path, const char *how) {
    int failed = strpbrk(how, "wa+") ? decide("open", path) : 0;
    if (failed > 0) { errno = failed; return NULL; }
    FILE *(*real)(const char *, const char *) = dlsym(RTLD_NEXT, name);
    return real(path, how);
}

FILE *fopen(const char *path, const char *how) { return stream("fopen", path, how); }
FILE *fopen64(const char *path, const char *how) { return stream("fopen64", path, how); }

ssize_t write(int file, const void *data, size_t size) {
    int failed = decide_for_file("write", file);
    FAIL_BY(failed);
    return syscall(SYS_write, file, data, failed < 0 && size > 1 ? size / 2 : size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    int failed = decide_for_file("write", file);
    FAIL_BY(failed);
    return syscall(SYS_pwrite64, file, data, failed < 0 && size > 1 ? size / 2 : size, place);
}

ssize_t pwrite64(int file, const void *data, size_t size, off_t place) { return pwrite(file, data, size, place); }

ssize_t writev(int file, const struct iovec *parts, int count) {
    int failed = decide_for_file("write", file);
    FAIL_BY(failed);
    return syscall(SYS_writev, file, parts, failed < 0 && count > 1 ? count / 2 : count);
}

ssize_t sendfile(int to, int from, off_t *place, size_t size) {
    int failed = decide_for_file("write", to);
    FAIL_BY(failed);
    return syscall(SYS_sendfile, to, from, place, failed < 0 && size > 1 ? 1 : size);
}

ssize_t sendfile64(int to, int from, off_t *place, size_t size) { return sendfile(to, from, place, size); }

ssize_t copy_file_range(int from, off_t *from_place, int to, off_t *to_place, size_t size, unsigned flags) {
    int failed = decide_for_file("write", to);
    FAIL_BY(failed);
    return syscall(SYS_copy_file_range, from, from_place, to, to_place, failed < 0 && size > 1 ? 1 : size, flags);
}

int fsync(int file) { FAIL_BY(decide_for_file("fsync", file)); return syscall(SYS_fsync, file); }
int fdatasync(int file) { FAIL_BY(decide_for_file("fsync", file)); return syscall(SYS_fdatasync, file); }

int ftruncate(int file, off_t size) { FAIL_BY(decide_for_file("truncate", file)); return syscall(SYS_ftruncate, file, size); }
int ftruncate64(int file, off_t size) { return ftruncate(file, size); }

int posix_fallocate(int file, off_t place, off_t size) {
    int failed = decide_for_file("truncate", file);
    if (failed > 0) return failed;
    return syscall(SYS_fallocate, file, 0, place, size) ? errno : 0;
}

int posix_fallocate64(int file, off_t place, off_t size) { return posix_fallocate(file, place, size); }

static int renamed(int old_folder, const char *old, int new_folder, const char *new, unsigned flags) {
    FAIL_BY(decide("rename", new));
    return syscall(SYS_renameat2, old_folder, old, new_folder, new, flags);
}

int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return renamed(from, old, to, new, flags);
}

int linkat(int from, const char *old, int to, const char *new, int flags) {
    FAIL_BY(decide("link", new));
    return syscall(SYS_linkat, from, old, to, new, flags);
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int symlinkat(const char *old, int to, const char *new) {
    FAIL_BY(decide("link", new));
    return syscall(SYS_symlinkat, old, to, new);
}

int symlink(const char *old, const char *new) { return symlinkat(old, AT_FDCWD, new); }

int mkdirat(int folder, const char *path, mode_t mode) {
    FAIL_BY(decide("mkdir", path));
    return syscall(SYS_mkdirat, folder, path, mode);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
