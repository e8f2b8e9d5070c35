/* Preloaded library that records every change to files below a folder, for a replay in which unsynced ones are lost.
 *
 * POWER_CUT_ROOT: the folder, an absolute path without links. POWER_CUT_LOG: the record, outside of it.
 *
 * An entry is one line of text, `OP ARGUMENTS`, and behind WRITE as many bytes as it says. Files are known by inode
 * number, places by absolute path. Call and entry are made under one lock of all processes, so that the order is right.
 * Changes through stdio, raw system calls (rustix in safetensors renames by one) and shared writable maps are not seen;
 * the last are noted as MAPPED.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static int record = -1;
static pid_t owner;
static char root[PATH_MAX];

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static ssize_t put(const void *data, size_t size) {
    static ssize_t (*write_)(int, const void *, size_t);
    if (!write_) write_ = (ssize_t (*)(int, const void *, size_t))real("write");
    size_t done = 0;
    while (done < size) {
        ssize_t n = write_(record, (const char *)data + done, size - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) abort();
        done += (size_t)n;
    }
    return (ssize_t)size;
}

static void lock_record(short kind) {
    struct flock all = {.l_type = kind, .l_whence = SEEK_SET};
    while (fcntl(record, F_SETLKW, &all) < 0)
        if (errno != EINTR) abort();
}

/* Whether this process records; then others wait until finish(). */
static int begin(void) {
    int before = errno;
    const char *place = getenv("POWER_CUT_LOG"), *folder = getenv("POWER_CUT_ROOT");
    if (!place || !folder) return 0;
    pthread_mutex_lock(&turn);
    if (record < 0 || owner != getpid()) {
        int (*open_)(const char *, int, ...) = (int (*)(const char *, int, ...))real("open");
        snprintf(root, sizeof root, "%s/", folder);
        owner = getpid();
        int opened = open_(place, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (opened < 0) abort();
        /* Out of the way of programs that count on low numbers. */
        record = fcntl(opened, F_DUPFD_CLOEXEC, 900);
        if (record < 0) abort();
        ((int (*)(int))real("close"))(opened);
    }
    lock_record(F_WRLCK);
    errno = before;
    return 1;
}

static void finish(int recording) {
    if (!recording) return;
    int before = errno;
    lock_record(F_UNLCK);
    pthread_mutex_unlock(&turn);
    errno = before;
}

static int inside(const char *path) { return strncmp(path, root, strlen(root)) == 0; }

/* The absolute path of a name that may not exist; its folder must. 0 if it has none. */
static int resolve(int folder, const char *name, char *path) {
    char joined[2 * PATH_MAX], parent[PATH_MAX], link[64];
    int before = errno;
    if (name[0] == '/' ) snprintf(joined, sizeof joined, "%s", name);
    else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) { errno = before; return 0; }
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) { errno = before; return 0; }
            base[n] = 0;
        }
        snprintf(joined, sizeof joined, "%s/%s", base, name);
    }
    size_t length = strlen(joined);
    while (length > 1 && joined[length - 1] == '/') joined[--length] = 0;
    char *slash = strrchr(joined, '/');
    *slash = 0;
    char *resolved = realpath(slash == joined ? "/" : joined, parent);
    errno = before;
    if (!resolved) return 0;
    snprintf(path, PATH_MAX, "%s/%s", strcmp(parent, "/") ? parent : "", slash + 1);
    return inside(path);
}

static int of_descriptor(int fd, struct stat *found) {
    char link[64], path[PATH_MAX];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    int is_inside = 0;
    if (n > 0) {
        path[n] = 0;
        is_inside = (inside(path) || !strncmp(path, root, strlen(root) - 1)) && fstat(fd, found) == 0;
    }
    errno = before;
    return is_inside;
}

static void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void note(const char *format, ...) {
    char line[3 * PATH_MAX];
    int before = errno;
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (n < 0 || (size_t)n >= sizeof line) abort();
    put(line, (size_t)n);
    errno = before;
}

static int opened(int folder, const char *name, int flags, mode_t mode, const char *how) {
    int (*openat_)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))real(how);
    char path[PATH_MAX];
    int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (!changes) return openat_(folder, name, flags, mode);
    int recording = begin();
    int is_inside = recording && resolve(folder, name, path);
    struct stat there;
    int before = errno, is_there = is_inside && lstat(path, &there) == 0;
    errno = before;
    int fd = openat_(folder, name, flags, mode);
    if (is_inside && fd >= 0 && fstat(fd, &there) == 0) {
        if ((flags & O_TMPFILE) == O_TMPFILE) note("UNNAMED %lu\n", there.st_ino);
        else if (!is_there) note("CREATE %lu %s\n", there.st_ino, path);
        else if (flags & O_TRUNC) note("TRUNCATE %lu 0\n", there.st_ino);
    }
    finish(recording);
    return fd;
}

static mode_t mode_of(int flags, va_list arguments) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
}

#define OPEN(function, folder, inner, ...)                           \
    int function(__VA_ARGS__, int flags, ...) {                      \
        va_list arguments;                                           \
        va_start(arguments, flags);                                  \
        mode_t mode = mode_of(flags, arguments);                     \
        va_end(arguments);                                           \
        return opened(folder, name, flags, mode, inner);             \
    }
OPEN(open, AT_FDCWD, "openat", const char *name)
OPEN(open64, AT_FDCWD, "openat64", const char *name)
OPEN(openat, folder, "openat", int folder, const char *name)
OPEN(openat64, folder, "openat64", int folder, const char *name)

int creat(const char *name, mode_t mode) { return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode, "openat"); }
int creat64(const char *name, mode_t mode) {
    return opened(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode, "openat64");
}

static void wrote(const struct stat *file, off_t offset, const void *data, size_t size) {
    note("WRITE %lu %ld %zu\n", file->st_ino, (long)offset, size);
    put(data, size);
}

/* Wrap a call on the descriptor `fd`, whose result is `done`: `then` notes what it did to the file or folder `file`. */
#define ON_DESCRIPTOR(type, function, parameters, arguments, fd, then)                            \
    type function parameters {                                                                    \
        struct stat file __attribute__((unused));                                                 \
        int recording = begin();                                                                  \
        int is_inside = recording && of_descriptor(fd, &file);                                    \
        /* Pipes may wait, and nobody is to wait for them. */                                     \
        if (!is_inside) finish(recording);                                                        \
        type done = REAL(function) arguments;                                                     \
        if (is_inside && done >= 0) { then; }                                                     \
        if (is_inside) finish(recording);                                                         \
        return done;                                                                              \
    }

static void wrote_pieces(const struct stat *file, off_t offset, const struct iovec *pieces, ssize_t left) {
    for (; left > 0; pieces++) {
        size_t size = (size_t)left < pieces->iov_len ? (size_t)left : pieces->iov_len;
        wrote(file, offset, pieces->iov_base, size);
        offset += (off_t)size;
        left -= (ssize_t)size;
    }
}

/* What the kernel copied to fd from offset on is read back. */
static void copied(int fd, const struct stat *file, off_t offset, ssize_t size) {
    char link[64], data[65536];
    int (*open_)(const char *, int, ...) = (int (*)(const char *, int, ...))real("open");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int source = open_(link, O_RDONLY | O_CLOEXEC);
    if (source < 0) abort();
    while (size > 0) {
        ssize_t n = pread(source, data, (size_t)size < sizeof data ? (size_t)size : sizeof data, offset);
        if (n <= 0) abort();
        wrote(file, offset, data, (size_t)n);
        offset += n;
        size -= n;
    }
    ((int (*)(int))real("close"))(source);
}

#define POSITION(fd) (lseek(fd, 0, SEEK_CUR) - done)
ON_DESCRIPTOR(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), fd,
              if (done > 0) wrote(&file, POSITION(fd), data, (size_t)done))
ON_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec *pieces, int count), (fd, pieces, count), fd,
              wrote_pieces(&file, POSITION(fd), pieces, done))
ON_DESCRIPTOR(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t offset), (fd, data, size, offset), fd,
              if (done > 0) wrote(&file, offset, data, (size_t)done))
ON_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t offset), (fd, data, size, offset), fd,
              if (done > 0) wrote(&file, offset, data, (size_t)done))
ON_DESCRIPTOR(ssize_t, sendfile, (int out, int in, off_t *from, size_t size), (out, in, from, size), out,
              copied(out, &file, POSITION(out), done))
ON_DESCRIPTOR(ssize_t, sendfile64, (int out, int in, off64_t *from, size_t size), (out, in, from, size), out,
              copied(out, &file, POSITION(out), done))
ON_DESCRIPTOR(ssize_t, copy_file_range, (int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags),
              (in, from, out, to, size, flags), out, copied(out, &file, to ? *to - done : POSITION(out), done))
ON_DESCRIPTOR(int, ftruncate, (int fd, off_t size), (fd, size), fd,
              note("TRUNCATE %lu %ld\n", file.st_ino, (long)size))
ON_DESCRIPTOR(int, ftruncate64, (int fd, off64_t size), (fd, size), fd,
              note("TRUNCATE %lu %ld\n", file.st_ino, (long)size))
ON_DESCRIPTOR(int, fsync, (int fd), (fd), fd, note("SYNC %lu\n", file.st_ino))
ON_DESCRIPTOR(int, fdatasync, (int fd), (fd), fd, note("SYNC %lu\n", file.st_ino))

void sync(void) {
    int recording = begin();
    REAL(sync)();
    if (recording) note("SYNC ALL\n");
    finish(recording);
}

static int renamed(int from, const char *old, int to, const char *new, unsigned flags, int plain) {
    char before[PATH_MAX], after[PATH_MAX];
    int recording = begin();
    int is_inside = recording && resolve(from, old, before) && resolve(to, new, after);
    int done = plain ? REAL(renameat)(from, old, to, new) : REAL(renameat2)(from, old, to, new, flags);
    struct stat file;
    if (is_inside && done == 0 && lstat(after, &file) == 0) note("RENAME %lu %s\t%s\n", file.st_ino, before, after);
    finish(recording);
    return done;
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0, 1); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0, 1); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    return renamed(from, old, to, new, flags, 0);
}

/* Wrap a call on a `name` in a `folder`: `then` notes what it did to the `file` at `path`. */
#define ON_NAME(function, parameters, arguments, folder, name, then)                              \
    int function parameters {                                                                     \
        char path[PATH_MAX];                                                                      \
        struct stat file __attribute__((unused));                                                 \
        int recording = begin();                                                                  \
        int is_inside = recording && resolve(folder, name, path);                                 \
        int done = REAL(function) arguments;                                                      \
        if (is_inside && done == 0) { then; }                                                     \
        finish(recording);                                                                        \
        return done;                                                                              \
    }

ON_NAME(linkat, (int from, const char *old, int to, const char *new, int flags), (from, old, to, new, flags), to, new,
        if (lstat(path, &file) == 0) note("LINK %lu %s\n", file.st_ino, path))
ON_NAME(symlinkat, (const char *target, int folder, const char *name), (target, folder, name), folder, name,
        if (lstat(path, &file) == 0) note("SYMLINK %lu %s\t%s\n", file.st_ino, path, target))
ON_NAME(unlinkat, (int folder, const char *name, int flags), (folder, name, flags), folder, name,
        note("UNLINK %s\n", path))
ON_NAME(mkdirat, (int folder, const char *name, mode_t mode), (folder, name, mode), folder, name,
        if (lstat(path, &file) == 0) note("MKDIR %lu %s\n", file.st_ino, path))

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
    struct stat there;
    return lstat(name, &there) == 0 && S_ISDIR(there.st_mode) ? rmdir(name) : unlink(name);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

#define MMAP(function)                                                                        \
    void *function(void *at, size_t size, int access, int flags, int fd, off_t offset) {      \
        void *(*inner)(void *, size_t, int, int, int, off_t) = REAL(function);                \
        if (fd >= 0 && (access & PROT_WRITE) && (flags & MAP_SHARED)) {                       \
            struct stat file;                                                                 \
            int recording = begin();                                                          \
            if (recording && of_descriptor(fd, &file)) note("MAPPED %lu\n", file.st_ino);     \
            finish(recording);                                                                \
        }                                                                                     \
        return inner(at, size, access, flags, fd, offset);                                    \
    }
MMAP(mmap)
MMAP(mmap64)
