/* Stands before the C library, and lets the system fail at the k-th call that changes something within a folder.

   cc -shared -fPIC -O1 shim.c -o shim.so -ldl, then LD_PRELOAD=shim.so, and `fault` by ctypes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static atomic_long calls;
static long from = -1, until = -1; /* which calls fail, counted from 1 */
static int error;                  /* with which errno; 0: SIGKILL */
static int record = -1;            /* where each call is written down */

/* Begins to count anew. Calls first to last fail; with a folder of length 0 nothing is looked at. */
void fault(const char *within, long first, long last, int code, int log) {
  folder[0] = 0;
  atomic_store(&calls, 0);
  from = first, until = last, error = code, record = log;
  strncpy(folder, within, sizeof folder - 1);
}

long counted(void) { return atomic_load(&calls); }

static void note(const char *name, const char *path, long number) {
  static ssize_t (*real)(int, const void *, size_t);
  char line[PATH_MAX + 64];
  if (!real) real = dlsym(RTLD_NEXT, "write");
  real(record, line, snprintf(line, sizeof line, "%ld %s %s\n", number, name, path));
}

/* Whether a call is to fail, with errno set. */
static int fails(const char *name, const char *path) {
  if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
  long number = atomic_fetch_add(&calls, 1) + 1;
  if (record >= 0) note(name, path, number);
  if (number < from || number > until) return 0;
  if (error == ENOSPC && !strcmp(name, "remove")) return 0; /* what is full can be emptied */
  if (!error) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  errno = error;
  return 1;
}

/* The same for a path that is relative to an open folder, or for an open file, if path is NULL. */
static int fails_at(const char *name, int file, const char *path) {
  char link[64], whole[2 * PATH_MAX];
  if (!folder[0] || file == record) return 0;
  if (path && path[0] == '/') return fails(name, path);
  if (file == AT_FDCWD) {
    if (!getcwd(whole, PATH_MAX)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, whole, PATH_MAX - 1);
    if (length < 0) return 0;
    whole[length] = 0;
  }
  if (path) {
    size_t length = strlen(whole);
    snprintf(whole + length, sizeof whole - length, "/%s", path);
  }
  return fails(name, whole);
}

/* Defines a function of the C library anew: it fails, or does what it did. */
#define CALL(type, name, is, at, path, parameters, ...)                    \
  type name parameters {                                                   \
    static type(*real) parameters;                                         \
    if (!real) real = dlsym(RTLD_NEXT, #name);                             \
    return fails_at(is, at, path) ? -1 : real(__VA_ARGS__);                \
  }

CALL(ssize_t, write, "write", file, NULL, (int file, const void *data, size_t size), file, data, size)
CALL(ssize_t, pwrite, "write", file, NULL, (int file, const void *data, size_t size, off_t at), file, data, size, at)
CALL(ssize_t, pwrite64, "write", file, NULL, (int file, const void *data, size_t size, off64_t at), file, data, size, at)
CALL(ssize_t, writev, "write", file, NULL, (int file, const struct iovec *parts, int count), file, parts, count)
CALL(ssize_t, pwritev, "write", file, NULL, (int file, const struct iovec *parts, int count, off_t at), file, parts,
     count, at)
CALL(int, fsync, "fsync", file, NULL, (int file), file)
CALL(int, fdatasync, "fsync", file, NULL, (int file), file)
CALL(int, ftruncate, "truncate", file, NULL, (int file, off_t size), file, size)
CALL(int, ftruncate64, "truncate", file, NULL, (int file, off64_t size), file, size)
CALL(int, rename, "rename", AT_FDCWD, old, (const char *old, const char *new), old, new)
CALL(int, renameat, "rename", at, old, (int at, const char *old, int to, const char *new), at, old, to, new)
CALL(int, mkdir, "mkdir", AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
CALL(int, mkdirat, "mkdir", at, path, (int at, const char *path, mode_t mode), at, path, mode)
CALL(int, unlink, "remove", AT_FDCWD, path, (const char *path), path)
CALL(int, unlinkat, "remove", at, path, (int at, const char *path, int flags), at, path, flags)
CALL(int, rmdir, "remove", AT_FDCWD, path, (const char *path), path)

/* Opening to read changes nothing. */
#define CHANGES (((flags & O_ACCMODE) != O_RDONLY) || (flags & O_CREAT))
#define MODE(mode)            \
  mode_t mode;                \
  va_list rest;               \
  va_start(rest, flags);      \
  mode = va_arg(rest, mode_t); \
  va_end(rest)

#define OPEN(name)                                                                  \
  int name(const char *path, int flags, ...) {                                      \
    static int (*real)(const char *, int, ...);                                     \
    if (!real) real = dlsym(RTLD_NEXT, #name);                                      \
    MODE(mode);                                                                     \
    return CHANGES && fails_at("open", AT_FDCWD, path) ? -1 : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                \
  int name(int at, const char *path, int flags, ...) {                              \
    static int (*real)(int, const char *, int, ...);                                \
    if (!real) real = dlsym(RTLD_NEXT, #name);                                      \
    MODE(mode);                                                                     \
    return CHANGES && fails_at("open", at, path) ? -1 : real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)
