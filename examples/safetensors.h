/* safetensors.h - reads and writes safetensors files: 8 bytes of header length, a JSON header, the numbers.
 *
 * Nothing in a file is trusted: lengths, offsets, shapes and names are checked before use, and the numbers must fill
 * the file without gap or overlap, as the format demands. Numbers in files are little-endian and may lie at any
 * offset; what st_find gives is aligned and in the machine's own order. Tensors of other types than F32 and BF16 are
 * listed with data = NULL. */

#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

enum {
    ST_NAME_SIZE = 256,
    ST_DIMENSIONS = 8,
    ST_TENSORS = 1 << 20,               /* most tensors in a file */
    ST_HEADER_SIZE = 100 * 1000 * 1000, /* longest header, the reference implementation's limit */
    ST_ALIGNMENT = 64                   /* of the first number in files written here */
};

typedef enum { ST_F32, ST_BF16, ST_OTHER } st_dtype;

typedef struct {
    char name[ST_NAME_SIZE];
    st_dtype dtype;
    int ndim;
    int64_t shape[ST_DIMENSIONS];
    int64_t count; /* product of the shape; 1 for a scalar */
    const void *data;
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
    void *copies; /* of the tensors that cannot be used where they lie */
    void *bytes;  /* the whole file, where st_open mapped or read it */
    size_t size;
} st_file;

/* 0, or -1 with a line in `message`; then there is nothing to close. */
static inline int st_open(st_file *f, const char *path, char *message, size_t message_size);

/* The same for a file's bytes in memory, which must outlive f. */
static inline int st_parse(st_file *f, const void *bytes, size_t size, char *message, size_t message_size);

/* NULL if absent. */
static inline const st_tensor *st_find(const st_file *f, const char *name);
static inline const char *st_metadata(const st_file *f, const char *key);

static inline void st_close(st_file *f);

/* A tensor for st_write; its count is -1 where the shape is too large. */
static inline st_tensor st_make(const char *name, st_dtype dtype, const void *data, int ndim, const int64_t *shape);

/* Writes F32 and BF16 tensors, the F32 ones first so that all lie aligned; `count` fields are not looked at. The same
 * arguments give the same bytes. The file appears whole or not at all. */
static inline int st_write(const char *path, const st_tensor *tensors, int count, const char *const (*metadata)[2],
                           int metadata_count, char *message, size_t message_size);

/* ---- Shared by reading and writing ------------------------------------------------------------------------- */

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static inline int
st__fail(char *message, size_t message_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (message && message_size) {
        vsnprintf(message, message_size, format, arguments);
        for (char *c = message; *c; c++) { /* a name from a file must not make a second line */
            *c = (unsigned char)*c < 0x20 || *c == 0x7F ? '?' : *c;
        }
    }
    va_end(arguments);
    return -1;
}

static inline int st__big_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 0;
}

static inline size_t st__size(st_dtype dtype) { return dtype == ST_F32 ? 4 : 2; }

/* Little-endian numbers of a file to the machine's own, or back. */
static inline void st__convert(unsigned char *to, const unsigned char *from, size_t bytes, size_t number_size) {
    if (!st__big_endian()) {
        memcpy(to, from, bytes);
        return;
    }
    for (size_t i = 0; i < bytes; i++) {
        to[i] = from[i - i % number_size + (number_size - 1 - i % number_size)];
    }
}

/* ---- Reading: the header's JSON ---------------------------------------------------------------------------- */

typedef struct {
    uint64_t begin, end;
} st__range;

typedef struct {
    const unsigned char *begin, *at, *end;
    char *text;                /* where the next decoded string goes; a decoded string is shorter than its source */
    const unsigned char *data; /* what lies behind the header */
    uint64_t data_size;
    st__range *ranges; /* of each tensor in `data` */
    int has_metadata;
    char *message;
    size_t message_size;
} st__reader;

/* One entry of the header while it is read. */
typedef struct {
    st_tensor tensor;
    int bits; /* of one number; 0: a type not known here */
    uint64_t begin, end;
} st__entry;

static inline int st__bad(const st__reader *r, const char *what) {
    return st__fail(r->message, r->message_size, "header, byte %lld: %s", (long long)(r->at - r->begin), what);
}

static inline void st__space(st__reader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\t' || *r->at == '\n' || *r->at == '\r')) {
        r->at++;
    }
}

/* Whether `c` comes next; if so, it is passed over. */
static inline int st__take(st__reader *r, int c) {
    st__space(r);
    if (r->at == r->end || *r->at != c) {
        return 0;
    }
    r->at++;
    return 1;
}

static inline int st__expect(st__reader *r, int c) {
    char what[] = "expected ' '";
    if (st__take(r, c)) {
        return 0;
    }
    what[10] = (char)c;
    return st__bad(r, what);
}

static inline int st__hex4(st__reader *r, uint32_t *code) {
    *code = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        const char digits[] = "0123456789abcdef";
        int c = r->at < r->end ? *r->at : 0;
        const char *digit = c ? strchr(digits, c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c) : NULL;
        if (!digit) {
            return st__bad(r, "expected a hexadecimal digit");
        }
        *code = *code << 4 | (uint32_t)(digit - digits);
    }
    return 0;
}

static inline void st__put_utf8(char **to, uint32_t code) {
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char lead[] = {0, 0xC0, 0xE0, 0xF0};
    *(*to)++ = (char)(unsigned char)(lead[more] | code >> (6 * more));
    while (more-- > 0) {
        *(*to)++ = (char)(unsigned char)(0x80 | (code >> (6 * more) & 0x3F));
    }
}

/* \uXXXX, the u being passed: one code point, from two escapes where it lies beyond the first 65,536. */
static inline int st__unicode_escape(st__reader *r, char **to) {
    uint32_t code, low;
    if (st__hex4(r, &code)) {
        return -1;
    }
    if (code >= 0xD800 && code < 0xDC00) {
        if (r->end - r->at < 2 || r->at[0] != '\\' || r->at[1] != 'u') {
            return st__bad(r, "half of a surrogate pair");
        }
        r->at += 2;
        if (st__hex4(r, &low)) {
            return -1;
        }
        if (low < 0xDC00 || low > 0xDFFF) {
            return st__bad(r, "half of a surrogate pair");
        }
        code = 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
        return st__bad(r, "half of a surrogate pair");
    }
    if (code == 0) {
        return st__bad(r, "a zero character in a string");
    }
    st__put_utf8(to, code);
    return 0;
}

static inline int st__escape(st__reader *r, char **to) {
    static const char from[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    int c = r->at < r->end ? *r->at : 0;
    const char *found = c ? strchr(from, c) : NULL;
    if (found) {
        r->at++;
        *(*to)++ = meant[found - from];
        return 0;
    }
    if (c != 'u') {
        return st__bad(r, "an unknown escape");
    }
    r->at++;
    return st__unicode_escape(r, to);
}

/* Bytes of the UTF-8 character at `s`, 0 where there is none: shortest form, no surrogate, up to U+10FFFF. */
static inline int st__utf8_length(const unsigned char *s, const unsigned char *end) {
    int length = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    if (length > end - s) {
        return 0;
    }
    for (int i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) {
            return 0;
        }
    }
    int bad = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
              (s[0] == 0xF4 && s[1] > 0x8F);
    return bad ? 0 : length;
}

static inline int st__string(st__reader *r, const char **string) {
    char *to = r->text;
    if (st__expect(r, '"')) {
        return -1;
    }
    *string = to;
    while (r->at < r->end && *r->at != '"') {
        int length = *r->at < 0x20 ? 0 : st__utf8_length(r->at, r->end);
        if (*r->at == '\\') {
            r->at++;
            if (st__escape(r, &to)) {
                return -1;
            }
            continue;
        }
        if (!length) {
            return st__bad(r, "a control character, or bytes that are not UTF-8");
        }
        memcpy(to, r->at, (size_t)length);
        to += length;
        r->at += length;
    }
    if (r->at == r->end) {
        return st__bad(r, "a string without an end");
    }
    r->at++;
    *to++ = 0;
    r->text = to;
    return 0;
}

/* A whole number from 0 to 2^63 - 1. */
static inline int st__integer(st__reader *r, int64_t *value) {
    st__space(r);
    const unsigned char *first = r->at;
    *value = 0;
    for (; r->at < r->end && *r->at >= '0' && *r->at <= '9'; r->at++) {
        int digit = *r->at - '0';
        if (*value > (INT64_MAX - digit) / 10) {
            return st__bad(r, "a number beyond 2^63");
        }
        *value = *value * 10 + digit;
    }
    if (r->at == first || (r->at - first > 1 && *first == '0')) {
        return st__bad(r, "expected a whole number");
    }
    return 0;
}

/* [a, b, ...] of at most `most` numbers. */
static inline int st__integers(st__reader *r, int64_t *values, int most, int *count) {
    *count = 0;
    if (st__expect(r, '[')) {
        return -1;
    }
    if (st__take(r, ']')) {
        return 0;
    }
    do {
        if (*count == most) {
            return st__bad(r, "too many numbers in a list");
        }
        if (st__integer(r, &values[(*count)++])) {
            return -1;
        }
    } while (st__take(r, ','));
    return st__expect(r, ']');
}

static inline void st__dtype(const char *name, st__entry *entry) {
    static const struct {
        const char *name;
        int bits;
    } known[] = {{"F32", 32},    {"BF16", 16},   {"F16", 16},    {"F64", 64},    {"BOOL", 8},
                 {"U8", 8},      {"I8", 8},      {"U16", 16},    {"I16", 16},    {"U32", 32},
                 {"I32", 32},    {"U64", 64},    {"I64", 64},    {"C64", 64},    {"F8_E4M3", 8},
                 {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4}};
    entry->tensor.dtype = strcmp(name, "F32") == 0 ? ST_F32 : strcmp(name, "BF16") == 0 ? ST_BF16 : ST_OTHER;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strcmp(name, known[i].name) == 0) {
            entry->bits = known[i].bits;
        }
    }
}

static inline int st__dtype_field(st__reader *r, st__entry *entry) {
    const char *name;
    if (st__string(r, &name)) {
        return -1;
    }
    st__dtype(name, entry);
    return 0;
}

static inline int st__offsets_field(st__reader *r, st__entry *entry) {
    int64_t offsets[2];
    int count;
    if (st__integers(r, offsets, 2, &count)) {
        return -1;
    }
    if (count != 2 || offsets[0] > offsets[1]) {
        return st__bad(r, "data_offsets are not [begin, end]");
    }
    entry->begin = (uint64_t)offsets[0];
    entry->end = (uint64_t)offsets[1];
    return 0;
}

/* {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, in any order. */
static inline int st__fields(st__reader *r, st__entry *entry) {
    static const char *const names[] = {"dtype", "shape", "data_offsets"};
    unsigned seen = 0;
    if (st__expect(r, '{')) {
        return -1;
    }
    do {
        const char *key;
        unsigned field = 0;
        if (st__string(r, &key) || st__expect(r, ':')) {
            return -1;
        }
        while (field < 3 && strcmp(key, names[field]) != 0) {
            field++;
        }
        if (field == 3 || (seen >> field & 1)) {
            return st__bad(r, "a tensor's field is unknown or stands twice");
        }
        seen |= 1u << field;
        if (field == 0   ? st__dtype_field(r, entry)
            : field == 1 ? st__integers(r, entry->tensor.shape, ST_DIMENSIONS, &entry->tensor.ndim)
                         : st__offsets_field(r, entry)) {
            return -1;
        }
    } while (st__take(r, ','));
    if (seen != 7) {
        return st__bad(r, "a tensor lacks dtype, shape or data_offsets");
    }
    return st__expect(r, '}');
}

static inline int st__count(st_tensor *t) {
    t->count = 1;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] == 0) {
            t->count = 0;
            return 0;
        }
    }
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 1 || t->count > INT64_MAX / 64 / t->shape[i]) {
            return -1;
        }
        t->count *= t->shape[i];
    }
    return 0;
}

/* Shape, type and range of one tensor agree. */
static inline int st__check_entry(const st__reader *r, st__entry *entry) {
    st_tensor *t = &entry->tensor;
    if (st__count(t)) {
        return st__fail(r->message, r->message_size, "tensor '%s': its shape is too large", t->name);
    }
    if (entry->end > r->data_size) {
        return st__fail(r->message, r->message_size, "tensor '%s' ends at byte %llu of %llu", t->name,
                        (unsigned long long)entry->end, (unsigned long long)r->data_size);
    }
    uint64_t bytes = entry->end - entry->begin;
    uint64_t bits = (uint64_t)t->count * (uint64_t)entry->bits;
    if (entry->bits && (bits % 8 || bits / 8 != bytes)) {
        return st__fail(r->message, r->message_size, "tensor '%s': %lld numbers do not fill its %llu bytes", t->name,
                        (long long)t->count, (unsigned long long)bytes);
    }
    return 0;
}

/* Makes room for one more element in an array that doubles. */
static inline int st__grow(const st__reader *r, void **array, int count, size_t element) {
    if (count == ST_TENSORS) {
        return st__bad(r, "too many entries");
    }
    if (count & (count - 1)) {
        return 0;
    }
    void *grown = realloc(*array, (count ? 2 * (size_t)count : 1) * element);
    if (!grown) {
        return st__bad(r, "out of memory");
    }
    *array = grown;
    return 0;
}

static inline int st__read_metadata(st__reader *r, st_file *f) {
    if (st__expect(r, '{')) {
        return -1;
    }
    if (st__take(r, '}')) {
        return 0;
    }
    do {
        st__pair pair;
        void *pairs = f->metadata;
        if (st__string(r, &pair.key) || st__expect(r, ':') || st__string(r, &pair.value) ||
            st__grow(r, &pairs, f->metadata_count, sizeof pair)) {
            return -1;
        }
        f->metadata = (st__pair *)pairs;
        f->metadata[f->metadata_count++] = pair;
    } while (st__take(r, ','));
    return st__expect(r, '}');
}

/* What follows a tensor's name. Its data are left where they lie, aligned or not. */
static inline int st__read_tensor(st__reader *r, st_file *f, const char *name) {
    st__entry entry;
    void *tensors = f->tensors, *ranges = r->ranges;
    memset(&entry, 0, sizeof entry);
    if (strlen(name) >= ST_NAME_SIZE) {
        return st__bad(r, "the name before this is too long");
    }
    memcpy(entry.tensor.name, name, strlen(name) + 1);
    if (st__fields(r, &entry) || st__check_entry(r, &entry)) {
        return -1;
    }
    if (st__grow(r, &tensors, f->count, sizeof *f->tensors)) {
        return -1;
    }
    f->tensors = (st_tensor *)tensors;
    if (st__grow(r, &ranges, f->count, sizeof *r->ranges)) {
        return -1;
    }
    r->ranges = (st__range *)ranges;
    r->ranges[f->count].begin = entry.begin;
    r->ranges[f->count].end = entry.end;
    entry.tensor.data = r->data + entry.begin;
    f->tensors[f->count++] = entry.tensor;
    return 0;
}

static inline int st__read_header(st__reader *r, st_file *f) {
    if (st__expect(r, '{')) {
        return -1;
    }
    if (!st__take(r, '}')) {
        do {
            const char *name;
            if (st__string(r, &name) || st__expect(r, ':')) {
                return -1;
            }
            int metadata = strcmp(name, "__metadata__") == 0;
            if (metadata && r->has_metadata) {
                return st__bad(r, "__metadata__ stands twice");
            }
            r->has_metadata |= metadata;
            if (metadata ? st__read_metadata(r, f) : st__read_tensor(r, f, name)) {
                return -1;
            }
        } while (st__take(r, ','));
        if (st__expect(r, '}')) {
            return -1;
        }
    }
    st__space(r);
    return r->at == r->end ? 0 : st__bad(r, "something follows the header's end");
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
    if (count) {
        qsort(r->ranges, (size_t)count, sizeof *r->ranges, st__by_begin);
    }
    for (int i = 0; i < count; i++) {
        if (r->ranges[i].begin != filled) {
            return st__fail(r->message, r->message_size, "tensors overlap or leave a gap at data byte %llu",
                            (unsigned long long)filled);
        }
        filled = r->ranges[i].end;
    }
    if (filled != r->data_size) {
        return st__fail(r->message, r->message_size, "the tensors fill %llu of %llu data bytes",
                        (unsigned long long)filled, (unsigned long long)r->data_size);
    }
    return 0;
}

/* Sorts both lists for bsearch. */
static inline int st__check_names(const st__reader *r, st_file *f) {
    if (f->count) {
        qsort(f->tensors, (size_t)f->count, sizeof *f->tensors, st__by_name);
    }
    if (f->metadata_count) {
        qsort(f->metadata, (size_t)f->metadata_count, sizeof *f->metadata, st__by_key);
    }
    for (int i = 1; i < f->count; i++) {
        if (st__by_name(&f->tensors[i - 1], &f->tensors[i]) == 0) {
            return st__fail(r->message, r->message_size, "tensor '%s' stands twice", f->tensors[i].name);
        }
    }
    for (int i = 1; i < f->metadata_count; i++) {
        if (st__by_key(&f->metadata[i - 1], &f->metadata[i]) == 0) {
            return st__fail(r->message, r->message_size, "a metadata key stands twice");
        }
    }
    return 0;
}

/* Bytes of the aligned copy that a tensor needs, 0 where its numbers can be used where they lie. */
static inline size_t st__copy_size(const st_tensor *t) {
    size_t number = st__size(t->dtype);
    if (t->dtype == ST_OTHER || (!st__big_endian() && (uintptr_t)t->data % number == 0)) {
        return 0;
    }
    return ((size_t)t->count * number + 7) / 8 * 8;
}

static inline int st__align(const st__reader *r, st_file *f) {
    size_t total = 0;
    for (int i = 0; i < f->count; i++) {
        total += st__copy_size(&f->tensors[i]);
    }
    f->copies = total ? malloc(total) : NULL;
    if (total && !f->copies) {
        return st__fail(r->message, r->message_size, "out of memory");
    }
    unsigned char *to = (unsigned char *)f->copies;
    for (int i = 0; i < f->count; i++) {
        st_tensor *t = &f->tensors[i];
        size_t number = st__size(t->dtype), size = st__copy_size(t);
        if (size) {
            st__convert(to, (const unsigned char *)t->data, (size_t)t->count * number, number);
            t->data = to;
            to += size;
        }
        if (t->dtype == ST_OTHER) {
            t->data = NULL;
        }
    }
    return 0;
}

/* ---- Reading: files ---------------------------------------------------------------------------------------- */

static inline void st__unmap(void *bytes, size_t size) {
#ifdef _WIN32
    (void)size;
    free(bytes);
#else
    if (bytes) {
        munmap(bytes, size);
    }
#endif
}

static inline void st_close(st_file *f) {
    free(f->tensors);
    free(f->text);
    free(f->metadata);
    free(f->copies);
    st__unmap(f->bytes, f->size);
    memset(f, 0, sizeof *f);
}

static inline int st_parse(st_file *f, const void *bytes, size_t size, char *message, size_t message_size) {
    const unsigned char *file = (const unsigned char *)bytes;
    uint64_t length = 0;
    memset(f, 0, sizeof *f);
    if (size < 8) {
        return st__fail(message, message_size, "not a safetensors file: %llu bytes", (unsigned long long)size);
    }
    for (int i = 7; i >= 0; i--) {
        length = length << 8 | file[i];
    }
    if (length > ST_HEADER_SIZE || length > size - 8) {
        return st__fail(message, message_size, "not a safetensors file: a header of %llu bytes in a file of %llu",
                        (unsigned long long)length, (unsigned long long)size);
    }
    st__reader r;
    memset(&r, 0, sizeof r);
    r.begin = r.at = file + 8;
    r.end = r.data = file + 8 + length;
    r.data_size = size - 8 - length;
    r.message = message;
    r.message_size = message_size;
    r.text = f->text = (char *)malloc((size_t)length + 1);
    int failed = !r.text ? st__fail(message, message_size, "out of memory")
                         : st__read_header(&r, f) || st__check_ranges(&r, f->count) || st__check_names(&r, f) ||
                               st__align(&r, f);
    free(r.ranges);
    if (failed) {
        st_close(f);
        return -1;
    }
    return 0;
}

#ifdef _WIN32
static inline void *st__map(const char *path, size_t *size, char *message, size_t message_size) {
    FILE *file = fopen(path, "rb");
    void *bytes = NULL;
    long length = -1;
    if (file && fseek(file, 0, SEEK_END) == 0 && (length = ftell(file)) >= 0 && fseek(file, 0, SEEK_SET) == 0) {
        bytes = malloc((size_t)length + 1);
    }
    if (!bytes || fread(bytes, 1, (size_t)length, file) != (size_t)length) {
        st__fail(message, message_size, "%s: %s", path, strerror(errno));
        free(bytes);
        bytes = NULL;
    }
    if (file) {
        fclose(file);
    }
    *size = (size_t)length;
    return bytes;
}
#else
static inline void *st__map(const char *path, size_t *size, char *message, size_t message_size) {
    struct stat status;
    void *bytes = MAP_FAILED;
    int file = open(path, O_RDONLY | O_NONBLOCK); /* a pipe must not make us wait before it is refused */
    if (file < 0 || fstat(file, &status)) {
        st__fail(message, message_size, "%s: %s", path, strerror(errno));
    } else if (!S_ISREG(status.st_mode)) {
        st__fail(message, message_size, "%s: not a regular file", path);
    } else if (status.st_size < 8 || (uint64_t)status.st_size > SIZE_MAX) {
        st__fail(message, message_size, "%s: not a safetensors file: %lld bytes", path, (long long)status.st_size);
    } else {
        *size = (size_t)status.st_size;
        bytes = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, file, 0);
        if (bytes == MAP_FAILED) {
            st__fail(message, message_size, "%s: %s", path, strerror(errno));
        }
    }
    if (file >= 0) {
        close(file);
    }
    return bytes == MAP_FAILED ? NULL : bytes;
}
#endif

static inline int st_open(st_file *f, const char *path, char *message, size_t message_size) {
    char text[512];
    size_t size = 0;
    memset(f, 0, sizeof *f);
    void *bytes = st__map(path, &size, message, message_size);
    if (!bytes) {
        return -1;
    }
    if (st_parse(f, bytes, size, text, sizeof text)) {
        st__unmap(bytes, size);
        return st__fail(message, message_size, "%s: %s", path, text);
    }
    f->bytes = bytes;
    f->size = size;
    return 0;
}

static inline const st_tensor *st_find(const st_file *f, const char *name) {
    for (int low = 0, high = f->count; low < high;) {
        int middle = low + (high - low) / 2, order = strcmp(name, f->tensors[middle].name);
        if (order == 0) {
            return &f->tensors[middle];
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

static inline const char *st_metadata(const st_file *f, const char *key) {
    st__pair wanted = {key, NULL};
    const st__pair *found = NULL;
    if (f->metadata_count) {
        found = (const st__pair *)bsearch(&wanted, f->metadata, (size_t)f->metadata_count, sizeof wanted, st__by_key);
    }
    return found ? found->value : NULL;
}

/* ---- Writing ----------------------------------------------------------------------------------------------- */

typedef struct {
    char *bytes;
    size_t size, capacity;
    int failed; /* out of memory */
} st__buffer;

static inline void st__append(st__buffer *b, const char *text, size_t size) {
    if (b->failed) return;
    if (size > b->capacity - b->size) {
        size_t capacity = 2 * b->capacity + size + 256;
        char *grown = (char *)malloc(capacity);
        b->failed = !grown;
        if (!grown) return;
        if (b->size) memcpy(grown, b->bytes, b->size);
        free(b->bytes);
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
        if (*string == '"' || *string == '\\') {
            st__append_text(b, "\\");
        }
        if ((unsigned char)*string < 0x20) {
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)(unsigned char)*string);
            st__append_text(b, escape);
        } else {
            st__append(b, string, 1);
        }
    }
    st__append_text(b, "\"");
}

static inline st_tensor st_make(const char *name, st_dtype dtype, const void *data, int ndim, const int64_t *shape) {
    st_tensor t;
    memset(&t, 0, sizeof t);
    snprintf(t.name, sizeof t.name, "%s", name);
    t.dtype = dtype;
    t.data = data;
    t.ndim = ndim;
    for (int i = 0; i < ndim && i < ST_DIMENSIONS; i++) {
        t.shape[i] = shape[i];
    }
    if (st__count(&t)) {
        t.count = -1;
    }
    return t;
}

static inline void st__append_tensor(st__buffer *b, const st_tensor *t, uint64_t *offset) {
    char number[80];
    uint64_t end = *offset + (uint64_t)t->count * st__size(t->dtype);
    st__append_text(b, b->size > 1 ? "," : "");
    st__append_string(b, t->name);
    st__append_text(b, t->dtype == ST_F32 ? ":{\"dtype\":\"F32\",\"shape\":[" : ":{\"dtype\":\"BF16\",\"shape\":[");
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
    for (int dtype = ST_F32; dtype <= ST_BF16; dtype++) {
        for (int i = 0; i < count; i++) {
            if ((int)tensors[i].dtype == dtype) {
                st__append_tensor(b, &tensors[i], &offset);
            }
        }
    }
    st__append_text(b, "}");
    while (!b->failed && (8 + b->size) % ST_ALIGNMENT) {
        st__append_text(b, " ");
    }
}

static inline int st__write_numbers(FILE *file, const st_tensor *t) {
    unsigned char chunk[4096];
    size_t number = st__size(t->dtype), total = (size_t)t->count * number;
    const unsigned char *from = (const unsigned char *)t->data;
    if (!st__big_endian()) {
        return total == 0 || fwrite(from, 1, total, file) == total ? 0 : -1;
    }
    for (size_t done = 0; done < total;) {
        size_t part = total - done < sizeof chunk ? total - done : sizeof chunk;
        st__convert(chunk, from + done, part, number);
        if (fwrite(chunk, 1, part, file) != part) {
            return -1;
        }
        done += part;
    }
    return 0;
}

static inline int st__write_all(FILE *file, const st__buffer *header, const st_tensor *tensors, int count) {
    unsigned char length[8];
    for (int i = 0; i < 8; i++) {
        length[i] = (unsigned char)((uint64_t)header->size >> (8 * i));
    }
    if (fwrite(length, 1, 8, file) != 8 || fwrite(header->bytes, 1, header->size, file) != header->size) {
        return -1;
    }
    for (int dtype = ST_F32; dtype <= ST_BF16; dtype++) {
        for (int i = 0; i < count; i++) {
            if ((int)tensors[i].dtype == dtype && st__write_numbers(file, &tensors[i])) {
                return -1;
            }
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
    for (int i = 0; i < 100; i++) {
        snprintf(name, name_size, "%s.%ld-%d.part", path, (long)getpid(), i);
        int file = open(name, O_WRONLY | O_CREAT | O_EXCL, 0666);
        if (file >= 0) {
            FILE *stream = fdopen(file, "wb");
            if (!stream) {
                close(file);
                remove(name);
            }
            return stream;
        }
        if (errno != EEXIST) {
            break;
        }
    }
    return NULL;
#endif
}

/* Writes header and numbers to a file beside `path`, then gives it that name. */
static inline int st__replace(const char *path, const st__buffer *header, const st_tensor *tensors, int count) {
    size_t name_size = strlen(path) + 64;
    char *name = (char *)malloc(name_size);
    FILE *file = name ? st__temporary(path, name, name_size) : NULL;
    int failed = 1;
    if (file) {
        failed = st__write_all(file, header, tensors, count) != 0;
        failed |= fclose(file) != 0;
#ifdef _WIN32
        if (!failed) {
            remove(path);
        }
#endif
        failed = failed || rename(name, path);
        if (failed) {
            int reason = errno;
            remove(name);
            errno = reason;
        }
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

static inline int st_write(const char *path, const st_tensor *tensors, int count, const char *const (*metadata)[2],
                           int metadata_count, char *message, size_t message_size) {
    st__buffer header;
    st_tensor *list = (st_tensor *)calloc((size_t)count + 1, sizeof *list);
    memset(&header, 0, sizeof header);
    if (!list) {
        return st__fail(message, message_size, "%s: out of memory", path);
    }
    for (int i = 0; i < count; i++) {
        list[i] = tensors[i];
        if (list[i].dtype == ST_OTHER || list[i].ndim < 0 || list[i].ndim > ST_DIMENSIONS || st__count(&list[i])) {
            free(list);
            return st__fail(message, message_size, "%s: tensor '%s' has no type or shape that can be written", path,
                            tensors[i].name);
        }
    }
    st__append_header(&header, list, count, metadata, metadata_count);
    int failed = -1;
    if (header.failed) {
        st__fail(message, message_size, "%s: out of memory", path);
    } else if (!st__replaceable(path)) {
        st__fail(message, message_size, "%s: exists and is not a regular file", path);
    } else {
        failed = st__replace(path, &header, list, count);
        if (failed) {
            st__fail(message, message_size, "%s: %s", path, strerror(errno));
        }
    }
    free(header.bytes);
    free(list);
    return failed;
}

#endif /* SAFETENSORS_H */
