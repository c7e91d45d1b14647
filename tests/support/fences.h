/* fences.h - memory that ends where memory ends. To be included after _DEFAULT_SOURCE (for MAP_ANONYMOUS). */

#ifndef TESTS_FENCES_H
#define TESTS_FENCES_H

#include <sys/mman.h>
#include <unistd.h>

#include "support.h"

/* Memory whose last byte is followed by a page that may not be touched, and whose page before may not either. */
typedef struct fenced {
    char *mapping;
    size_t mapped;
    void *data;
    char *first; /* right behind the page before; `data` begins up to a page later */
} fenced;

SUPPORT fenced fenced_new(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    fenced f = {NULL, (pages + 2) * page, NULL, NULL};
    f.mapping = mmap(NULL, f.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f.mapping == MAP_FAILED || mprotect(f.mapping, page, PROT_NONE) != 0 ||
        mprotect(f.mapping + (pages + 1) * page, page, PROT_NONE) != 0) {
        perror("tests: guard pages");
        exit(1);
    }
    f.first = f.mapping + page;
    f.data = f.mapping + (pages + 1) * page - bytes;
    return f;
}

SUPPORT fenced fenced_copy(const void *data, size_t bytes) {
    fenced f = fenced_new(bytes);
    if (bytes) memcpy(f.data, data, bytes);
    return f;
}

SUPPORT void fenced_free(fenced *f) { munmap(f->mapping, f->mapped); }

#endif /* TESTS_FENCES_H */
