/* The safetensors reader on arbitrary bytes: whatever it accepts can be read to the last number, is named and counted
 * as the format says, and comes back the same after being written. */

#define _POSIX_C_SOURCE 200809L
#include "fuzz.h"
#include "safetensors.h"

#include <math.h>

static uint32_t read_all(const st_tensor *t) {
    size_t bytes = (size_t)t->count * st__size(t->dtype);
    uint32_t sum = 0;
    for (size_t i = 0; i < bytes; i++) {
        sum = sum * 31 + ((const unsigned char *)t->data)[i];
    }
    return sum;
}

/* F16 as IEEE 754 defines it. */
static double half_value(const unsigned char *bytes) {
    const int half = bytes[0] | bytes[1] << 8, exponent = half >> 10 & 31, fraction = half & 1023;
    double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                   : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                  : ldexp(fraction, -24);
    return half >> 15 ? -value : value;
}

/* F16 is widened without loss, signs of zeros too. */
static void check_halves(const st_tensor *t) {
    for (int64_t i = 0; i < t->count; i++) {
        const double expected = half_value(t->bytes + 2 * i), got = (double)((const float *)t->data)[i];
        REQUIRE(isnan(expected) ? isnan(got) : expected == got);
        REQUIRE(isnan(got) || !signbit(got) == !signbit(expected));
    }
}

static void check_tensor(const st_file *file, const st_tensor *t) {
    int64_t count = 1;
    int empty = 0; /* then the other dimensions may multiply to anything */
    REQUIRE(t->ndim >= 0 && t->ndim <= ST_DIMENSIONS);
    REQUIRE(memchr(t->name, 0, sizeof t->name));
    REQUIRE(st_find(file, t->name) == t);
    for (int i = 0; i < t->ndim; i++) {
        empty |= t->shape[i] == 0;
    }
    for (int i = 0; i < t->ndim; i++) {
        REQUIRE(t->shape[i] >= 0);
        count = empty ? 0 : count * t->shape[i];
    }
    REQUIRE(count == t->count);
    REQUIRE(t->type && (t->data != NULL) == (t->dtype != ST_OTHER));
    if (t->dtype != ST_OTHER) {
        REQUIRE(t->count == 0 || (uintptr_t)t->data % st__size(t->dtype) == 0);
        read_all(t);
    }
    if (strcmp(t->type, "F16") == 0) check_halves(t);
}

static void check_round_trip(const st_file *file) {
    char path[64], message[300];
    const char *const metadata[1][2] = {{"key", "value"}};
    st_file again;
    snprintf(path, sizeof path, "/tmp/fuzz-safetensors-%ld", (long)getpid());
    REQUIRE(st_write(path, file->tensors, file->count, metadata, 1, message, sizeof message) == 0);
    REQUIRE(st_open(&again, path, message, sizeof message) == 0);
    REQUIRE(again.count == file->count);
    REQUIRE(strcmp(st_metadata(&again, "key"), "value") == 0);
    for (int i = 0; i < file->count; i++) {
        const st_tensor *t = &file->tensors[i], *u = st_find(&again, t->name);
        REQUIRE(u && u->dtype == t->dtype && u->ndim == t->ndim && u->count == t->count);
        REQUIRE(read_all(t) == read_all(u));
    }
    st_close(&again);
    remove(path);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char message[300] = "";
    st_file file;
    if (st_parse(&file, data, size, message, sizeof message)) {
        REQUIRE(message[0] && !strchr(message, '\n'));
        return 0;
    }
    int writable = 1;
    for (int i = 0; i < file.count; i++) {
        check_tensor(&file, &file.tensors[i]);
        writable = writable && file.tensors[i].dtype != ST_OTHER;
    }
    REQUIRE(st_find(&file, "no such tensor, surely") == NULL);
    if (writable) {
        check_round_trip(&file);
    }
    st_close(&file);
    return 0;
}
