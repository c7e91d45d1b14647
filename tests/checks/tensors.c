/* A safetensors file made of others' tensors, for the tests of the command line: tensors OUT ITEM...
 *
 *     @KEY=VALUE                  metadata
 *     FILE:NAME=NEW               a tensor, its bytes and its type as they are, under a new name
 *     FILE:NAME=NEW,F8_E4M3       the same bytes called another type, as far as they go
 *     FILE:NAME=NEW,F16           F32 numbers, cut down to F16's
 *     FILE:NAME=NEW,CUT           the same numbers as F32
 *
 * It writes by itself, so that the reader's counterpart is not the writer that came with it. */
#define _POSIX_C_SOURCE 200809L
#include "safetensors.h"

enum { ITEMS = 64 };

typedef struct item {
    const char *type;
    char name[ST_NAME_SIZE], shape[128];
    unsigned char *bytes;
    size_t size;
} item;

static void die(const char *what, const char *which) {
    fprintf(stderr, "tensors: %s: %s\n", which, what);
    exit(1);
}

/* Without the 13 last bits, and 0 where F16 has no normal number so small. */
static uint32_t cut(uint32_t bits) { return (bits >> 23 & 0xFF) < 113 ? bits & 0x80000000u : bits & 0xFFFFE000u; }

static uint32_t half(uint32_t bits) {
    const uint32_t magnitude = cut(bits) & 0x7FFFFFFFu;
    return (bits >> 16 & 0x8000u) | (magnitude ? (magnitude >> 13) - (112u << 10) : 0);
}

static void put(unsigned char *to, uint32_t value, int bytes) {
    for (int i = 0; i < bytes; i++) to[i] = (unsigned char)(value >> 8 * i);
}

/* From little-endian F32 to numbers of `size` bytes. */
static void narrow(item *to, const unsigned char *from, int64_t count, int size) {
    to->size = (size_t)count * (size_t)size;
    for (int64_t i = 0; i < count; i++, from += 4) {
        const uint32_t bits = from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
        put(to->bytes + i * size, size == 2 ? half(bits) : cut(bits), size);
    }
}

static void take(const st_tensor *t, const char *type, item *to) {
    size_t used = 0;
    to->type = type ? type : t->type;
    to->size = (size_t)t->count * (size_t)st__bits(to->type) / 8;
    if (type && strcmp(type, "CUT") == 0) to->type = "F32";
    to->bytes = (unsigned char *)malloc((size_t)t->count * 8 + 1);
    if (!to->bytes) die("out of memory", t->name);
    for (int i = 0; i < t->ndim; i++) {
        used +=
            (size_t)snprintf(to->shape + used, sizeof to->shape - used, "%s%lld", i ? "," : "", (long long)t->shape[i]);
    }
    if (type && strcmp(type, "CUT") == 0) {
        narrow(to, t->bytes, t->count, 4);
    } else if (type && strcmp(type, "F16") == 0) {
        narrow(to, t->bytes, t->count, 2);
    } else {
        memcpy(to->bytes, t->bytes, to->size);
    }
}

/* FILE:NAME=NEW[,TYPE] */
static void read_item(char *text, item *to) {
    char message[512], *name = strrchr(text, ':'), *renamed = name ? strchr(name, '=') : NULL;
    st_file file;
    if (!renamed) die("not an item", text);
    *name++ = *renamed++ = 0;
    char *type = strchr(renamed, ',');
    if (type) *type++ = 0;
    if (st_open(&file, text, message, sizeof message)) die(message, text);
    const st_tensor *t = st_listed(&file, name);
    if (!t) die("no such tensor", name);
    snprintf(to->name, sizeof to->name, "%s", renamed);
    take(t, type, to);
    to->type = strdup(to->type);
    st_close(&file);
}

static size_t write_header(char *to, size_t size, const item *items, int count, char **metadata, int pairs) {
    size_t used = (size_t)snprintf(to, size, "{"), at = 0;
    for (int i = 0; i < pairs; i++) {
        char *value = strchr(metadata[i], '=');
        if (!value) die("no KEY=VALUE", metadata[i]);
        used += (size_t)snprintf(to + used, size - used, "%s\"%.*s\":\"%s\"%s", i ? "," : "\"__metadata__\":{",
                                 (int)(value - metadata[i] - 1), metadata[i] + 1, value + 1, i == pairs - 1 ? "}" : "");
    }
    for (int i = 0; i < count; i++, at += items[i - 1].size) {
        used += (size_t)snprintf(to + used, size - used,
                                 "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%llu,%llu]}",
                                 i || pairs ? "," : "", items[i].name, items[i].type, items[i].shape,
                                 (unsigned long long)at, (unsigned long long)(at + items[i].size));
    }
    return used + (size_t)snprintf(to + used, size - used, "}");
}

int main(int argc, char **argv) {
    static item items[ITEMS];
    static char header[1 << 16], *metadata[ITEMS];
    int count = 0, pairs = 0;
    if (argc < 3 || argc - 2 > ITEMS) die("needs OUT and items", "usage");
    for (int i = 2; i < argc; i++) {
        if (argv[i][0] == '@') {
            metadata[pairs++] = argv[i];
        } else {
            read_item(argv[i], &items[count++]);
        }
    }
    unsigned char length[8] = {0};
    const size_t size = write_header(header, sizeof header, items, count, metadata, pairs);
    put(length, (uint32_t)size, 4);
    FILE *file = fopen(argv[1], "wb");
    int failed = !file || fwrite(length, 8, 1, file) != 1 || fwrite(header, size, 1, file) != 1;
    for (int i = 0; i < count; i++) {
        failed |= !failed && items[i].size && fwrite(items[i].bytes, items[i].size, 1, file) != 1;
        free(items[i].bytes);
        free((void *)(uintptr_t)items[i].type);
    }
    if (failed || fclose(file)) die("cannot be written", argv[1]);
    return 0;
}
