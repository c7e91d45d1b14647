/* paths.h - what a program asks about the names of files before it opens them. */

#ifndef PATHS_H
#define PATHS_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Where the file's own name begins in a path. */
static inline const char *path_name(const char *path) {
    const char *name = path;
    for (const char *c = path; *c; c++) {
        if (*c == '/') name = c + 1;
#ifdef _WIN32
        if (*c == '\\' || *c == ':') name = c + 1;
#endif
    }
    return name;
}

/* A file beside the one that `path` names, to be freed; NULL where memory lacks. */
static inline char *path_beside(const char *path, const char *name) {
    const size_t folder = (size_t)(path_name(path) - path), size = folder + strlen(name) + 1;
    char *joined = (char *)malloc(size);
    if (joined) snprintf(joined, size, "%.*s%s", (int)folder, path, name);
    return joined;
}

static inline int path_is_folder(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISDIR(status.st_mode);
}

static inline int path_exists(const char *path) {
    struct stat status;
    return stat(path, &status) == 0;
}

#ifdef _WIN32
/* Whether two paths name one file. Windows' stat numbers none, so it goes by the whole name. */
static inline int path_same_file(const char *a, const char *b) {
    char *x = _fullpath(NULL, a, 0), *y = _fullpath(NULL, b, 0);
    const int same = x && y && _stricmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}
#else
/* What a path stands for: a file that exists, else a name in a folder. 0, or -1 where not even the folder exists. */
static inline int path__identify(const char *path, struct stat *status, const char **name) {
    *name = "";
    if (stat(path, status) == 0) return 0;
    char *folder = path_beside(path, ".");
    *name = path_name(path);
    const int failed = !folder || stat(folder, status) != 0;
    free(folder);
    return failed ? -1 : 0;
}

/* Whether two paths name one file, by whatever folders and links; it need not exist yet. */
static inline int path_same_file(const char *a, const char *b) {
    struct stat x, y;
    const char *x_name, *y_name;
    return path__identify(a, &x, &x_name) == 0 && path__identify(b, &y, &y_name) == 0 && x.st_dev == y.st_dev &&
           x.st_ino == y.st_ino && strcmp(x_name, y_name) == 0;
}
#endif

#endif /* PATHS_H */
