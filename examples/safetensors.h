/* safetensors.h - reads and writes safetensors files: 8 bytes of header length, a JSON header, the numbers.
 *
 * Nothing in a file is trusted: lengths, offsets, shapes and names are checked before use, and the numbers must fill
 * the file without gap or overlap, as the format demands. Numbers in files are little-endian and may lie at any
 * offset; what st_find gives is aligned and in the machine's own order. F32 and BF16 are read as they are and F16 as
 * F32, exactly; tensors of other types are listed, without numbers. */

#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "json.h"

#include <errno.h>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

enum {
    ST_NAME_SIZE = 256,
    ST_DIMENSIONS = 8,
    ST_HEADER_SIZE = 100 * 1000 * 1000, /* longest header, the reference implementation's limit */
    ST_ALIGNMENT = 64                   /* of the first number in files written here */
};

typedef enum { ST_F32, ST_BF16, ST_U8, ST_OTHER } st_dtype;

typedef struct {
    char name[ST_NAME_SIZE];
    st_dtype dtype; /* of `data` */
    int ndim;
    const char *type; /* as the file names it: "F16", "F8_E4M3" */
    int64_t shape[ST_DIMENSIONS];
    int64_t count;    /* product of the shape; 1 for a scalar */
    const void *data; /* NULL until the tensor is made ready */

    /* Private: where the numbers lie in the file, and a copy of those that cannot be used there. */
    const unsigned char *bytes;
    void *copy;
} st_tensor;

typedef struct {
    const char *key, *value;
} st__pair;

/* A file that was read. All of it is private but for the list of tensors, sorted by name. */
typedef struct st_file {
    st_tensor *tensors;
    int count;
    char *text;         /* names, metadata keys and values, one after another */
    st__pair *metadata; /* sorted by key */
    int metadata_count;
    void *bytes; /* the whole file, where st_open mapped or read it */
    size_t size;
} st_file;

/* 0, or -1 with a line in `message`; then there is nothing to close. */
static inline int st_open(st_file *f, const char *path, char *message, size_t message_size);

/* The same for a file's bytes in memory, which must outlive f. */
static inline int st_parse(st_file *f, const void *bytes, size_t size, char *message, size_t message_size);

/* What the file says of a tensor, whose numbers may not be ready; NULL if absent. */
static inline st_tensor *st_listed(const st_file *f, const char *name);

/* Sees to `data` where the type is one that is read. 0, or -1 where memory lacks. Not for two threads at once. */
static inline int st_ready(st_tensor *t);

/* A tensor made ready, NULL if absent; data is NULL where its type is not read, or memory lacks. */
static inline const st_tensor *st_find(const st_file *f, const char *name);

/* NULL if absent. */
static inline const char *st_metadata(const st_file *f, const char *key);

static inline void st_close(st_file *f);

/* A tensor for st_write; its count is -1 where the shape is too large. */
static inline st_tensor st_make(const char *name, st_dtype dtype, const void *data, int ndim, const int64_t *shape);

/* Writes F32 and BF16 tensors, the F32 ones first so that all lie aligned; `count` fields are not looked at. The same
 * arguments give the same bytes. The file appears whole or not at all. */
static inline int st_write(const char *path, const st_tensor *tensors, int count, const char *const (*metadata)[2],
                           int metadata_count, char *message, size_t message_size);

/* The bytes of a regular file for reading, NULL with a line in `message`. */
static inline void *st_map(const char *path, size_t *size, char *message, size_t message_size);
static inline void st_unmap(void *bytes, size_t size);

/* ---- Shared by reading and writing ------------------------------------------------------------------------- */

static inline int st__big_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 0;
}

static inline size_t st__size(st_dtype dtype) { return dtype == ST_F32 ? 4 : dtype == ST_BF16 ? 2 : 1; }

static inline const char *st__type(st_dtype dtype) {
    return dtype == ST_F32 ? "F32" : dtype == ST_BF16 ? "BF16" : "U8";
}

/* Little-endian numbers of a file to the machine's own, or back. */
static inline void st__convert(unsigned char *to, const unsigned char *from, size_t bytes, size_t number_size) {
    if (!st__big_endian()) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes; i++) to[i] = from[i - i % number_size + (number_size - 1 - i % number_size)];
}

/* The product of the shape, 0 where one dimension is. -1 where it is too large. */
static inline int st__count(st_tensor *t) {
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) t->count = 0;
    }
    for (int i = 0; i < t->ndim && t->count; i++) {
        if (t->shape[i] < 1 || t->count > INT64_MAX / 64 / t->shape[i]) return -1;
        t->count *= t->shape[i];
    }
    return 0;
}

/* ---- Reading: one tensor's entry in the header ------------------------------------------------------------- */

typedef struct {
    uint64_t begin, end;
} st__range;

typedef struct {
    json header;
    const unsigned char *data; /* what lies behind the header */
    uint64_t data_size;
    st__range *ranges; /* of each tensor in `data` */
    char *message;
    size_t message_size;
} st__reader;

/* Bits of one number; 0: a type not known here. */
static inline int st__bits(const char *type) {
    static const struct {
        const char *type;
        int bits;
    } known[] = {{"F32", 32},    {"BF16", 16},   {"F16", 16},    {"F64", 64},    {"BOOL", 8},
                 {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},    {"U32", 32},
                 {"I32", 32},    {"U64", 64},    {"I64", 64},    {"C64", 64},    {"F8_E4M3", 8},
                 {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(type, known[i].type) == 0) return known[i].bits;
    }
    return 0;
}

static inline int st__is_f16(const st_tensor *t) { return strcmp(t->type, "F16") == 0; }

static inline int st__read_type(json *j, st_tensor *t) {
    if (json_string(j, &t->type)) return -1;
    t->dtype = ST_F32;
    while (t->dtype < ST_OTHER && strcmp(t->type, st__type(t->dtype)) != 0) t->dtype = (st_dtype)(t->dtype + 1);
    if (st__is_f16(t)) t->dtype = ST_F32;
    return 0;
}

/* [a, b, ...] of at most `most` numbers. */
static inline int st__read_integers(json *j, int64_t *values, int most, int *count) {
    int more, n = 0;
    for (*count = 0; (more = json_element(j, &n)) > 0; (*count)++) {
        if (*count == most) return json_bad(j, "too many numbers in a list");
        if (json_integer(j, &values[*count])) return -1;
    }
    return more;
}

static inline int st__read_offsets(json *j, st__range *range) {
    int64_t offsets[2];
    int count;
    if (st__read_integers(j, offsets, 2, &count)) return -1;
    if (count != 2 || offsets[0] > offsets[1]) return json_bad(j, "data_offsets are not [begin, end]");
    range->begin = (uint64_t)offsets[0];
    range->end = (uint64_t)offsets[1];
    return 0;
}

/* {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, in any order. */
static inline int st__read_fields(json *j, st_tensor *t, st__range *range) {
    static const char *const names[] = {"dtype", "shape", "data_offsets"};
    const char *key;
    unsigned seen = 0;
    int more;
    for (int n = 0; (more = json_member(j, &n, &key)) > 0;) {
        unsigned field = 0;
        while (field < 3 && strcmp(key, names[field]) != 0) field++;
        if (field == 3 || (seen >> field & 1)) return json_bad(j, "a tensor's field is unknown or stands twice");
        seen |= 1u << field;
        if (field == 0   ? st__read_type(j, t)
            : field == 1 ? st__read_integers(j, t->shape, ST_DIMENSIONS, &t->ndim)
                         : st__read_offsets(j, range)) {
            return -1;
        }
    }
    if (more == 0 && seen != 7) return json_bad(j, "a tensor lacks dtype, shape or data_offsets");
    return more;
}

/* Shape, type and range of one tensor agree. */
static inline int st__check_tensor(const st__reader *r, st_tensor *t, const st__range *range) {
    if (st__count(t)) {
        return json_fail(r->message, r->message_size, "tensor '%s': its shape is too large", t->name);
    }
    if (range->end > r->data_size) {
        return json_fail(r->message, r->message_size, "tensor '%s' ends at byte %llu of %llu", t->name,
                         (unsigned long long)range->end, (unsigned long long)r->data_size);
    }
    const uint64_t bytes = range->end - range->begin, bits = (uint64_t)t->count * (uint64_t)st__bits(t->type);
    if (st__bits(t->type) && (bits % 8 || bits / 8 != bytes)) {
        return json_fail(r->message, r->message_size, "tensor '%s': %lld numbers do not fill its %llu bytes", t->name,
                         (long long)t->count, (unsigned long long)bytes);
    }
    return 0;
}

/* ---- Reading: the header ----------------------------------------------------------------------------------- */

static inline int st__read_metadata(json *j, st_file *f) {
    st__pair pair;
    int more;
    for (int n = 0; (more = json_member(j, &n, &pair.key)) > 0;) {
        void *pairs = f->metadata;
        if (json_string(j, &pair.value) || json_grow(j, &pairs, f->metadata_count, sizeof pair)) return -1;
        f->metadata = (st__pair *)pairs;
        f->metadata[f->metadata_count++] = pair;
    }
    return more;
}

/* What follows a tensor's name. */
static inline int st__read_tensor(st__reader *r, st_file *f, const char *name) {
    st_tensor t;
    st__range range;
    void *tensors = f->tensors, *ranges = r->ranges;
    memset(&t, 0, sizeof t);
    if (strlen(name) >= ST_NAME_SIZE) return json_bad(&r->header, "the name before this is too long");
    memcpy(t.name, name, strlen(name) + 1);
    if (st__read_fields(&r->header, &t, &range) || st__check_tensor(r, &t, &range)) return -1;
    if (json_grow(&r->header, &tensors, f->count, sizeof t)) return -1;
    f->tensors = (st_tensor *)tensors;
    if (json_grow(&r->header, &ranges, f->count, sizeof range)) return -1;
    r->ranges = (st__range *)ranges;
    t.bytes = r->data + range.begin;
    r->ranges[f->count] = range;
    f->tensors[f->count++] = t;
    return 0;
}

static inline int st__read_header(st__reader *r, st_file *f) {
    const char *name;
    int more, has_metadata = 0;
    for (int n = 0; (more = json_member(&r->header, &n, &name)) > 0;) {
        const int metadata = strcmp(name, "__metadata__") == 0;
        if (metadata && has_metadata++) return json_bad(&r->header, "__metadata__ stands twice");
        if (metadata ? st__read_metadata(&r->header, f) : st__read_tensor(r, f, name)) return -1;
    }
    return more || json_end(&r->header) ? -1 : 0;
}

/* ---- Reading: what holds between entries ------------------------------------------------------------------- */

static inline int st__by_begin(const void *a, const void *b) {
    const st__range *x = (const st__range *)a, *y = (const st__range *)b;
    return x->begin != y->begin ? (x->begin > y->begin) - (x->begin < y->begin) : (x->end > y->end) - (x->end < y->end);
}

static inline int st__by_name(const void *a, const void *b) {
    return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

static inline int st__by_key(const void *a, const void *b) {
    return strcmp(((const st__pair *)a)->key, ((const st__pair *)b)->key);
}

/* The tensors follow each other without gap or overlap from the first byte to the last. */
static inline int st__check_ranges(const st__reader *r, int count) {
    uint64_t filled = 0;
    if (count) qsort(r->ranges, (size_t)count, sizeof *r->ranges, st__by_begin);
    for (int i = 0; i < count; i++) {
        if (r->ranges[i].begin != filled) {
            return json_fail(r->message, r->message_size, "tensors overlap or leave a gap at data byte %llu",
                             (unsigned long long)filled);
        }
        filled = r->ranges[i].end;
    }
    if (filled == r->data_size) return 0;
    return json_fail(r->message, r->message_size, "the tensors fill %llu of %llu data bytes",
                     (unsigned long long)filled, (unsigned long long)r->data_size);
}

/* Sorts both lists for bsearch. */
static inline int st__check_names(const st__reader *r, st_file *f) {
    if (f->count) qsort(f->tensors, (size_t)f->count, sizeof *f->tensors, st__by_name);
    if (f->metadata_count) qsort(f->metadata, (size_t)f->metadata_count, sizeof *f->metadata, st__by_key);
    for (int i = 1; i < f->count; i++) {
        if (st__by_name(&f->tensors[i - 1], &f->tensors[i]) == 0) {
            return json_fail(r->message, r->message_size, "tensor '%s' stands twice", f->tensors[i].name);
        }
    }
    for (int i = 1; i < f->metadata_count; i++) {
        if (st__by_key(&f->metadata[i - 1], &f->metadata[i]) == 0) {
            return json_fail(r->message, r->message_size, "a metadata key stands twice");
        }
    }
    return 0;
}

/* ---- Reading: numbers -------------------------------------------------------------------------------------- */

/* An F16 number as F32, both by their bits. */
static inline uint32_t st__widened(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, fraction = half & 0x3FF, exponent = half >> 10 & 31;
    if (exponent == 31) return sign | 0x7F800000 | fraction << 13; /* infinite, or NaN */
    if (exponent) return sign | (exponent + 127 - 15) << 23 | fraction << 13;
    const float small = (float)fraction * 0x1p-24f; /* subnormal as F16, not as F32 */
    uint32_t bits;
    memcpy(&bits, &small, sizeof bits);
    return sign | bits;
}

static inline void st__widen(uint32_t *to, const unsigned char *from, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = st__widened((uint16_t)(from[2 * i] | from[2 * i + 1] << 8));
}

static inline int st_ready(st_tensor *t) {
    const size_t number = st__size(t->dtype);
    if (t->data || t->dtype == ST_OTHER) return 0;
    if (t->count == 0 || (!st__is_f16(t) && !st__big_endian() && (uintptr_t)t->bytes % number == 0)) {
        t->data = t->bytes;
        return 0;
    }
    t->data = t->copy = calloc((size_t)t->count, number);
    if (!t->copy) return -1;
    if (st__is_f16(t)) {
        st__widen((uint32_t *)t->copy, t->bytes, t->count);
    } else {
        st__convert((unsigned char *)t->copy, t->bytes, (size_t)t->count * number, number);
    }
    return 0;
}

/* ---- Reading: files ---------------------------------------------------------------------------------------- */

static inline void st_unmap(void *bytes, size_t size) {
#ifdef _WIN32
    (void)size;
    free(bytes);
#else
    if (bytes) munmap(bytes, size);
#endif
}

static inline void st_close(st_file *f) {
    for (int i = 0; i < f->count; i++) free(f->tensors[i].copy);
    free(f->tensors);
    free(f->text);
    free(f->metadata);
    st_unmap(f->bytes, f->size);
    memset(f, 0, sizeof *f);
}

static inline int st_parse(st_file *f, const void *bytes, size_t size, char *message, size_t message_size) {
    const unsigned char *file = (const unsigned char *)bytes;
    uint64_t length = 0;
    memset(f, 0, sizeof *f);
    if (size < 8)
        return json_fail(message, message_size, "not a safetensors file: %llu bytes", (unsigned long long)size);
    for (int i = 7; i >= 0; i--) length = length << 8 | file[i];
    if (length > ST_HEADER_SIZE || length > size - 8) {
        return json_fail(message, message_size, "not a safetensors file: a header of %llu bytes in a file of %llu",
                         (unsigned long long)length, (unsigned long long)size);
    }
    f->text = (char *)malloc((size_t)length + 1);
    if (!f->text) return json_fail(message, message_size, "out of memory");
    st__reader r;
    memset(&r, 0, sizeof r);
    r.header = json_open("header", file + 8, (size_t)length, f->text, message, message_size);
    r.data = file + 8 + length;
    r.data_size = size - 8 - length;
    r.message = message;
    r.message_size = message_size;
    const int failed = st__read_header(&r, f) || st__check_ranges(&r, f->count) || st__check_names(&r, f);
    free(r.ranges);
    if (failed) st_close(f);
    return failed ? -1 : 0;
}

#ifdef _WIN32
static inline void *st_map(const char *path, size_t *size, char *message, size_t message_size) {
    FILE *file = fopen(path, "rb");
    void *bytes = NULL;
    long length = -1;
    if (file && fseek(file, 0, SEEK_END) == 0 && (length = ftell(file)) >= 0 && fseek(file, 0, SEEK_SET) == 0) {
        bytes = malloc((size_t)length + 1);
    }
    if (!bytes || fread(bytes, 1, (size_t)length, file) != (size_t)length) {
        json_fail(message, message_size, "%s: %s", path, strerror(errno));
        free(bytes);
        bytes = NULL;
    }
    if (file) fclose(file);
    *size = (size_t)length;
    return bytes;
}
#else
static inline void *st_map(const char *path, size_t *size, char *message, size_t message_size) {
    struct stat status;
    void *bytes = MAP_FAILED;
    const int file = open(path, O_RDONLY | O_NONBLOCK); /* a pipe must not make us wait before it is refused */
    if (file < 0 || fstat(file, &status)) {
        json_fail(message, message_size, "%s: %s", path, strerror(errno));
    } else if (!S_ISREG(status.st_mode)) {
        json_fail(message, message_size, "%s: not a regular file", path);
    } else if (status.st_size == 0 || (uint64_t)status.st_size > SIZE_MAX) {
        json_fail(message, message_size, "%s: a file of %lld bytes", path, (long long)status.st_size);
    } else {
        *size = (size_t)status.st_size;
        bytes = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
        if (bytes == MAP_FAILED) json_fail(message, message_size, "%s: %s", path, strerror(errno));
    }
    if (file >= 0) close(file);
    return bytes == MAP_FAILED ? NULL : bytes;
}
#endif

static inline int st_open(st_file *f, const char *path, char *message, size_t message_size) {
    char text[512];
    size_t size = 0;
    memset(f, 0, sizeof *f);
    void *bytes = st_map(path, &size, message, message_size);
    if (!bytes) return -1;
    if (st_parse(f, bytes, size, text, sizeof text)) {
        st_unmap(bytes, size);
        return json_fail(message, message_size, "%s: %s", path, text);
    }
    f->bytes = bytes;
    f->size = size;
    return 0;
}

static inline st_tensor *st_listed(const st_file *f, const char *name) {
    int low = 0;
    for (int high = f->count; low < high;) {
        const int middle = low + (high - low) / 2;
        if (strcmp(name, f->tensors[middle].name) > 0) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < f->count && strcmp(name, f->tensors[low].name) == 0 ? &f->tensors[low] : NULL;
}

static inline const st_tensor *st_find(const st_file *f, const char *name) {
    st_tensor *t = st_listed(f, name);
    if (t) (void)st_ready(t);
    return t;
}

static inline const char *st_metadata(const st_file *f, const char *key) {
    const st__pair wanted = {key, NULL};
    if (!f->metadata_count) return NULL;
    const st__pair *found =
        (const st__pair *)bsearch(&wanted, f->metadata, (size_t)f->metadata_count, sizeof wanted, st__by_key);
    return found ? found->value : NULL;
}

/* ---- Writing: the header ----------------------------------------------------------------------------------- */

typedef struct {
    char *bytes;
    size_t size, capacity;
    int failed; /* out of memory */
} st__buffer;

static inline void st__append(st__buffer *b, const char *text, size_t size) {
    if (b->failed) return;
    if (size > b->capacity - b->size) {
        const size_t capacity = 2 * b->capacity + size + 256;
        char *grown = (char *)realloc(b->bytes, capacity);
        b->failed = !grown;
        if (!grown) return;
        b->bytes = grown;
        b->capacity = capacity;
    }
    memcpy(b->bytes + b->size, text, size);
    b->size += size;
}

static inline void st__append_text(st__buffer *b, const char *text) { st__append(b, text, strlen(text)); }

static inline void st__append_string(st__buffer *b, const char *string) {
    st__append_text(b, "\"");
    for (; *string; string++) {
        char escape[8];
        if (*string == '"' || *string == '\\') st__append_text(b, "\\");
        if ((unsigned char)*string < 0x20) {
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)(unsigned char)*string);
            st__append_text(b, escape);
        } else {
            st__append(b, string, 1);
        }
    }
    st__append_text(b, "\"");
}

static inline void st__append_tensor(st__buffer *b, const st_tensor *t, uint64_t *offset) {
    char number[80];
    const uint64_t end = *offset + (uint64_t)t->count * st__size(t->dtype);
    st__append_text(b, b->size > 1 ? "," : "");
    st__append_string(b, t->name);
    st__append_text(b, ":{\"dtype\":");
    st__append_string(b, st__type(t->dtype));
    st__append_text(b, ",\"shape\":[");
    for (int i = 0; i < t->ndim; i++) {
        snprintf(number, sizeof number, "%s%lld", i ? "," : "", (long long)t->shape[i]);
        st__append_text(b, number);
    }
    snprintf(number, sizeof number, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)*offset,
             (unsigned long long)end);
    st__append_text(b, number);
    *offset = end;
}

static inline void st__append_header(st__buffer *b, const st_tensor *tensors, int count,
                                     const char *const (*metadata)[2], int metadata_count) {
    uint64_t offset = 0;
    st__append_text(b, "{");
    for (int i = 0; i < metadata_count; i++) {
        st__append_text(b, i ? "," : "\"__metadata__\":{");
        st__append_string(b, metadata[i][0]);
        st__append_text(b, ":");
        st__append_string(b, metadata[i][1]);
    }
    st__append_text(b, metadata_count > 0 ? "}" : "");
    for (int dtype = ST_F32; dtype < ST_OTHER; dtype++) {
        for (int i = 0; i < count; i++) {
            if ((int)tensors[i].dtype == dtype) st__append_tensor(b, &tensors[i], &offset);
        }
    }
    st__append_text(b, "}");
    while (!b->failed && (8 + b->size) % ST_ALIGNMENT) st__append_text(b, " ");
}

/* ---- Writing: the file ------------------------------------------------------------------------------------- */

static inline int st__write_numbers(FILE *file, const st_tensor *t) {
    unsigned char chunk[4096];
    const size_t number = st__size(t->dtype), total = (size_t)t->count * number;
    const unsigned char *from = (const unsigned char *)t->data;
    if (!st__big_endian()) return total == 0 || fwrite(from, 1, total, file) == total ? 0 : -1;
    for (size_t done = 0; done < total;) {
        const size_t part = total - done < sizeof chunk ? total - done : sizeof chunk;
        st__convert(chunk, from + done, part, number);
        if (fwrite(chunk, 1, part, file) != part) return -1;
        done += part;
    }
    return 0;
}

static inline int st__write_all(FILE *file, const st__buffer *header, const st_tensor *tensors, int count) {
    unsigned char length[8];
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)header->size >> (8 * i));
    if (fwrite(length, 1, 8, file) != 8 || fwrite(header->bytes, 1, header->size, file) != header->size) return -1;
    for (int dtype = ST_F32; dtype < ST_OTHER; dtype++) {
        for (int i = 0; i < count; i++) {
            if ((int)tensors[i].dtype == dtype && st__write_numbers(file, &tensors[i])) return -1;
        }
    }
    return 0;
}

/* A new file beside `path`, whose name goes to `name`. */
static inline FILE *st__temporary(const char *path, char *name, size_t name_size) {
#ifdef _WIN32
    snprintf(name, name_size, "%s.part", path);
    return fopen(name, "wb");
#else
    int file = -1;
    errno = EEXIST;
    for (int i = 0; i < 100 && file < 0 && errno == EEXIST; i++) {
        snprintf(name, name_size, "%s.%ld-%d.part", path, (long)getpid(), i);
        file = open(name, O_WRONLY | O_CREAT | O_EXCL, 0666);
    }
    FILE *stream = file < 0 ? NULL : fdopen(file, "wb");
    if (!stream && file >= 0) {
        close(file);
        remove(name);
    }
    return stream;
#endif
}

/* Writes header and numbers to a file beside `path`, then gives it that name. */
static inline int st__replace(const char *path, const st__buffer *header, const st_tensor *tensors, int count) {
    const size_t name_size = strlen(path) + 64;
    char *name = (char *)malloc(name_size);
    FILE *file = name ? st__temporary(path, name, name_size) : NULL;
    int failed = 1;
    if (file) {
        failed = st__write_all(file, header, tensors, count) != 0;
        failed |= fclose(file) != 0;
#ifdef _WIN32
        if (!failed) remove(path);
#endif
        failed = failed || rename(name, path);
        const int reason = errno;
        if (failed) remove(name);
        errno = reason;
    }
    free(name);
    return failed ? -1 : 0;
}

/* Devices, folders and links must not be replaced by a file. */
static inline int st__replaceable(const char *path) {
#ifdef _WIN32
    (void)path;
    return 1;
#else
    struct stat status;
    return lstat(path, &status) != 0 || S_ISREG(status.st_mode);
#endif
}

static inline st_tensor st_make(const char *name, st_dtype dtype, const void *data, int ndim, const int64_t *shape) {
    st_tensor t;
    memset(&t, 0, sizeof t);
    snprintf(t.name, sizeof t.name, "%.*s", ST_NAME_SIZE - 1, name);
    t.dtype = dtype;
    t.type = st__type(dtype);
    t.data = data;
    t.ndim = ndim;
    for (int i = 0; i < ndim && i < ST_DIMENSIONS; i++) t.shape[i] = shape[i];
    if (st__count(&t)) t.count = -1;
    return t;
}

static inline int st__writable(st_tensor *t) {
    return t->dtype != ST_OTHER && t->ndim >= 0 && t->ndim <= ST_DIMENSIONS && st__count(t) == 0;
}

static inline int st_write(const char *path, const st_tensor *tensors, int count, const char *const (*metadata)[2],
                           int metadata_count, char *message, size_t message_size) {
    st__buffer header;
    st_tensor *list = (st_tensor *)calloc((size_t)count + 1, sizeof *list);
    int good = 0, failed = -1;
    memset(&header, 0, sizeof header);
    if (!list) return json_fail(message, message_size, "%s: out of memory", path);
    for (; good < count; good++) {
        list[good] = tensors[good];
        if (!st__writable(&list[good])) break;
    }
    if (good == count) st__append_header(&header, list, count, metadata, metadata_count);
    if (good < count) {
        json_fail(message, message_size, "%s: tensor '%s' has no type or shape that can be written", path,
                  tensors[good].name);
    } else if (header.failed) {
        json_fail(message, message_size, "%s: out of memory", path);
    } else if (!st__replaceable(path)) {
        json_fail(message, message_size, "%s: exists and is not a regular file", path);
    } else {
        failed = st__replace(path, &header, list, count);
        if (failed) json_fail(message, message_size, "%s: %s", path, strerror(errno));
    }
    free(header.bytes);
    free(list);
    return failed;
}

#endif /* SAFETENSORS_H */
