/* json.h - reads JSON (RFC 8259) from memory, front to back, without building a tree.
 *
 *     json j = json_open("config.json", text, size, room, message, message_size);
 *     for (int n = 0; (more = json_member(&j, &n, &key)) > 0;) {
 *         if (strcmp(key, "factor") == 0 ? json_number(&j, &factor) : json_skip(&j)) return -1;
 *     }
 *
 * Nothing in the text is trusted. What is not JSON, not UTF-8, nested too deep, or a zero character in a string, ends
 * the reading with -1 and a line in `message` that names the byte. */

#ifndef JSON_H
#define JSON_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    JSON_DEPTH = 64,       /* most values within values */
    JSON_ENTRIES = 1 << 20 /* longest list that is kept */
};

typedef struct json {
    const char *name; /* what messages call the text */
    const unsigned char *begin, *at, *end;
    char *room; /* where the next string goes; each takes no more than its source did */
    char *message;
    size_t message_size;
} json;

/* `room` is for the strings that will be read: as many bytes as the text has, and one. */
static inline json json_open(const char *name, const void *text, size_t size, char *room, char *message,
                             size_t message_size) {
    json j = {name, (const unsigned char *)text, (const unsigned char *)text, NULL, room, message, message_size};
    j.end = j.begin + size;
    return j;
}

/* ---- Failing ----------------------------------------------------------------------------------------------- */

/* Puts one line into `message`, whatever the names in it hold. -1. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static inline int
json_fail(char *message, size_t message_size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (message && message_size) {
        vsnprintf(message, message_size, format, arguments);
        for (char *c = message; *c; c++) *c = (unsigned char)*c < 0x20 || *c == 0x7F ? '?' : *c;
    }
    va_end(arguments);
    return -1;
}

static inline int json_bad(const json *j, const char *what) {
    json_fail(j->message, j->message_size, "%s, byte %lld: %s", j->name, (long long)(j->at - j->begin), what);
    return -1;
}

/* Makes room for one more element in an array that doubles. */
static inline int json_grow(const json *j, void **array, int count, size_t element) {
    if (count == JSON_ENTRIES) return json_bad(j, "too many entries");
    if (count & (count - 1)) return 0;
    void *grown = realloc(*array, (count ? 2 * (size_t)count : 1) * element);
    if (!grown) return json_bad(j, "out of memory");
    *array = grown;
    return 0;
}

/* ---- Single characters ------------------------------------------------------------------------------------- */

static inline int json__byte(const json *j) { return j->at < j->end ? *j->at : 0; }

/* What comes next, spaces passed over; 0 at the end. */
static inline int json_peek(json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) j->at++;
    return json__byte(j);
}

/* Whether `c` comes next; if so, it is passed over. */
static inline int json_take(json *j, int c) {
    if (json_peek(j) != c) return 0;
    j->at++;
    return 1;
}

static inline int json_expect(json *j, int c) {
    char what[] = "expected ' '";
    what[10] = (char)c;
    return json_take(j, c) ? 0 : json_bad(j, what);
}

/* ---- Strings ----------------------------------------------------------------------------------------------- */

static inline int json__hex4(json *j, uint32_t *code) {
    static const char digits[] = "0123456789abcdef";
    *code = 0;
    for (int i = 0; i < 4; i++, j->at++) {
        const int c = json__byte(j);
        const char *digit = c ? strchr(digits, c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c) : NULL;
        if (!digit) return json_bad(j, "expected a hexadecimal digit");
        *code = *code << 4 | (uint32_t)(digit - digits);
    }
    return 0;
}

static inline void json__put_utf8(char **to, uint32_t code) {
    static const unsigned char lead[] = {0, 0xC0, 0xE0, 0xF0};
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *(*to)++ = (char)(unsigned char)(lead[more] | code >> (6 * more));
    while (more-- > 0) *(*to)++ = (char)(unsigned char)(0x80 | (code >> (6 * more) & 0x3F));
}

/* \uXXXX, the u being passed: one code point, from two escapes where it lies beyond the first 65,536. */
static inline int json__unicode_escape(json *j, char **to) {
    uint32_t code, low = 0;
    if (json__hex4(j, &code)) return -1;
    if (code == 0) return json_bad(j, "a zero character in a string");
    if (code >= 0xD800 && code <= 0xDFFF) {
        const int paired = code < 0xDC00 && j->end - j->at >= 2 && j->at[0] == '\\' && j->at[1] == 'u';
        if (paired) j->at += 2;
        if (paired && json__hex4(j, &low)) return -1;
        if (low < 0xDC00 || low > 0xDFFF) return json_bad(j, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
    }
    json__put_utf8(to, code);
    return 0;
}

static inline int json__escape(json *j, char **to) {
    static const char from[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    const int c = json__byte(j);
    const char *found = c ? strchr(from, c) : NULL;
    if (!found && c != 'u') return json_bad(j, "an unknown escape");
    j->at++;
    if (!found) return json__unicode_escape(j, to);
    *(*to)++ = meant[found - from];
    return 0;
}

/* Bytes of the UTF-8 character at `s`, 0 where there is none: shortest form, no surrogate, up to U+10FFFF. */
static inline int json__utf8_length(const unsigned char *s, const unsigned char *end) {
    const int length = s[0] < 0x80 ? 1 : s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    if (length > end - s) return 0;
    for (int i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
    }
    const int bad = (s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F) || (s[0] == 0xF0 && s[1] < 0x90) ||
                    (s[0] == 0xF4 && s[1] > 0x8F);
    return bad ? 0 : length;
}

/* One character of a string, as it stands. */
static inline int json__character(json *j, char **to) {
    const int length = *j->at < 0x20 ? 0 : json__utf8_length(j->at, j->end);
    if (!length) return json_bad(j, "a control character, or bytes that are not UTF-8");
    memcpy(*to, j->at, (size_t)length);
    *to += length;
    j->at += length;
    return 0;
}

static inline int json_string(json *j, const char **string) {
    char *to = j->room;
    if (json_expect(j, '"')) return -1;
    while (j->at < j->end && *j->at != '"') {
        const int escape = *j->at == '\\';
        j->at += escape;
        if (escape ? json__escape(j, &to) : json__character(j, &to)) return -1;
    }
    if (j->at == j->end) return json_bad(j, "a string without an end");
    j->at++;
    *to++ = 0;
    *string = j->room;
    j->room = to;
    return 0;
}

/* ---- Numbers ----------------------------------------------------------------------------------------------- */

static inline int64_t json__digits(json *j) {
    const unsigned char *first = j->at;
    while (json__byte(j) >= '0' && json__byte(j) <= '9') j->at++;
    return j->at - first;
}

/* A number as it stands, for strtod. */
static inline int json_number(json *j, const char **number) {
    json_peek(j);
    const unsigned char *first = j->at;
    j->at += json__byte(j) == '-';
    const int zero = json__byte(j) == '0';
    const int64_t whole = json__digits(j);
    int bad = whole == 0 || (zero && whole > 1);
    if (json__byte(j) == '.') {
        j->at++;
        bad |= json__digits(j) == 0;
    }
    if (json__byte(j) == 'e' || json__byte(j) == 'E') {
        j->at++;
        j->at += json__byte(j) == '+' || json__byte(j) == '-';
        bad |= json__digits(j) == 0;
    }
    if (bad) return json_bad(j, "expected a number");
    memcpy(j->room, first, (size_t)(j->at - first));
    *number = j->room;
    j->room += j->at - first;
    *j->room++ = 0;
    return 0;
}

/* A whole number from 0 to 2^63 - 1. */
static inline int json_integer(json *j, int64_t *value) {
    json_peek(j);
    const unsigned char *first = j->at;
    *value = 0;
    for (; json__byte(j) >= '0' && json__byte(j) <= '9'; j->at++) {
        const int digit = *j->at - '0';
        if (*value > (INT64_MAX - digit) / 10) return json_bad(j, "a number beyond 2^63");
        *value = *value * 10 + digit;
    }
    const int bad = j->at == first || (j->at - first > 1 && *first == '0');
    return bad ? json_bad(j, "expected a whole number") : 0;
}

/* ---- Values within values ---------------------------------------------------------------------------------- */

/* 1: another value follows; 0: the bracket is closed; -1. `count` is 0 before the first. */
static inline int json__more(json *j, int *count, int open, int close) {
    if ((*count)++ == 0) return json_expect(j, open) ? -1 : !json_take(j, close);
    if (json_take(j, ',')) return 1;
    return json_expect(j, close);
}

/* The next member of an object, up to its value, which is the caller's to read. */
static inline int json_member(json *j, int *count, const char **key) {
    const int more = json__more(j, count, '{', '}');
    if (more < 1) return more;
    return json_string(j, key) || json_expect(j, ':') ? -1 : 1;
}

/* The next element of an array, which is the caller's to read. */
static inline int json_element(json *j, int *count) { return json__more(j, count, '[', ']'); }

/* Whether `word`, one of true, false and null, comes next; if so, it is passed over. */
static inline int json_word(json *j, const char *word) {
    const size_t length = strlen(word);
    json_peek(j);
    if ((size_t)(j->end - j->at) < length || memcmp(j->at, word, length) != 0) return 0;
    j->at += length;
    return 1;
}

/* A value that holds no others. */
static inline int json__skip_simple(json *j) {
    const char *text;
    const int first = json_peek(j);
    if (first == '"') return json_string(j, &text);
    if (first == '-' || (first >= '0' && first <= '9')) return json_number(j, &text);
    return json_word(j, "true") || json_word(j, "false") || json_word(j, "null") ? 0 : json_bad(j, "expected a value");
}

/* Passes over a value of any kind. */
static inline int json_skip(json *j) {
    char open[JSON_DEPTH] = {0}, *room = j->room;
    int count[JSON_DEPTH] = {0}, depth = 0, failed = 0;
    const char *key;
    do {
        const int first = json_peek(j), nested = first == '{' || first == '[';
        if (nested && depth == JSON_DEPTH) return json_bad(j, "nested too deep");
        if (nested) {
            open[depth] = (char)first;
            count[depth++] = 0;
        } else {
            failed = json__skip_simple(j);
        }
        int more = 0;
        while (depth > 0 && !failed && !more) { /* what is closed here is done */
            int *n = &count[depth - 1];
            more = open[depth - 1] == '{' ? json_member(j, n, &key) : json_element(j, n);
            failed = more < 0;
            depth -= more == 0;
        }
        j->room = room;
    } while (depth > 0 && !failed);
    return failed ? -1 : 0;
}

/* Nothing but spaces is left. */
static inline int json_end(json *j) {
    json_peek(j);
    return j->at == j->end ? 0 : json_bad(j, "something follows the end");
}

#endif /* JSON_H */
