/* runner.h - the test runner: greatest (https://github.com/silentbicycle/greatest) where the compiler finds it, else
 * the part of its macros that these tests use, written anew below. TESTS_OWN_RUNNER forces the latter.  A test is
 * one property and reads as a sentence:  TEST a_window_of_equal_scores_is_averaged(void) { ... PASS(); } A file of
 * tests ends with  TESTS_MAIN(suite)  whose program runs alone, takes -v, -f (stop at the first failure), -s SUITE,
 * -t TEST, and prints as its last line  N passed, N failed. */

#ifndef TESTS_RUNNER_H
#define TESTS_RUNNER_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define TESTS_MAY_BE_UNUSED       __attribute__((unused))
#define TESTS_PRINTF(text, first) __attribute__((format(printf, text, first), unused))
#else
#define TESTS_MAY_BE_UNUSED
#define TESTS_PRINTF(text, first)
#endif

#if defined(__has_include) && !defined(TESTS_OWN_RUNNER)
#if __has_include(<greatest.h>)
#define TESTS_GREATEST
#endif
#endif

#ifdef TESTS_GREATEST

#define GREATEST_USE_LONGJMP 0
#include <greatest.h>

/* Its own casts an argument without parentheses, and takes NaN to be in any range. */
#undef ASSERT_MEM_EQ
#define ASSERT_MEM_EQ(expected, got, size) GREATEST_ASSERT_MEM_EQ((expected), (got), (size))
#undef ASSERT_IN_RANGE
#define ASSERT_IN_RANGE(expected, got, tolerance)                                              \
    do {                                                                                       \
        double runner_got = (got);                                                             \
        GREATEST_ASSERTm(#got " is NaN", runner_got == runner_got);                            \
        GREATEST_ASSERT_IN_RANGEm(#expected " != " #got, (expected), runner_got, (tolerance)); \
    } while (0)

#else /* the same names, our own text */

typedef enum { RUNNER_PASS, RUNNER_FAIL, RUNNER_SKIP } runner_result;

static struct {
    unsigned passed, failed, skipped;
    int verbose, first_fail; /* first_fail: no test is run after one that failed */
    const char *suite_filter, *test_filter;
    const char *suffix;  /* of the next test's name */
    const char *message; /* of the last FAIL or SKIP */
    const char *file;
    int line;
} runner;

#define TEST        static runner_result
#define SUITE(name) static void name(void)

static inline runner_result runner_end(runner_result result, const char *message, const char *file, int line) {
    runner.message = message;
    runner.file = file;
    runner.line = line;
    return result;
}

#define PASS()         return RUNNER_PASS
#define SKIPm(message) return runner_end(RUNNER_SKIP, message, __FILE__, __LINE__)
#define FAILm(message) return runner_end(RUNNER_FAIL, message, __FILE__, __LINE__)
#define SKIP()         SKIPm("")
#define FAIL()         FAILm("")

#define ASSERTm(message, condition)       \
    do {                                  \
        if (!(condition)) FAILm(message); \
    } while (0)
#define ASSERT(condition)        ASSERTm(#condition, condition)
#define ASSERT_FALSE(condition)  ASSERTm("not " #condition, !(condition))
#define ASSERT_EQ(expected, got) ASSERTm(#expected " != " #got, (expected) == (got))
#define ASSERT_EQ_FMT(expected, got, format)                                             \
    do {                                                                                 \
        if ((expected) != (got)) {                                                       \
            printf("\nExpected: " format "\n     Got: " format "\n", (expected), (got)); \
            FAILm(#expected " != " #got);                                                \
        }                                                                                \
    } while (0)
#define ASSERT_IN_RANGE(expected, got, tolerance)                                                                 \
    do {                                                                                                          \
        double runner_expected = (expected), runner_got = (got), runner_tolerance = (tolerance);                  \
        double runner_distance = runner_expected - runner_got;                                                    \
        if (!(runner_distance <= runner_tolerance && -runner_distance <= runner_tolerance)) {                     \
            printf("\nExpected: %.9g +/- %.3g\n     Got: %.9g\n", runner_expected, runner_tolerance, runner_got); \
            FAILm(#expected " != " #got " +/- " #tolerance);                                                      \
        }                                                                                                         \
    } while (0)
#define ASSERT_STR_EQ(expected, got)                                               \
    do {                                                                           \
        const char *runner_expected = (expected), *runner_got = (got);             \
        if (strcmp(runner_expected, runner_got) != 0) {                            \
            printf("\nExpected: %s\n     Got: %s\n", runner_expected, runner_got); \
            FAILm(#expected " != " #got);                                          \
        }                                                                          \
    } while (0)
#define ASSERT_MEM_EQ(expected, got, size)                                                                             \
    do {                                                                                                               \
        const unsigned char *runner_expected = (const unsigned char *)(expected);                                      \
        const unsigned char *runner_got = (const unsigned char *)(got);                                                \
        size_t runner_at = 0, runner_size = (size);                                                                    \
        while (runner_at < runner_size && runner_expected[runner_at] == runner_got[runner_at]) runner_at++;            \
        if (runner_at < runner_size) {                                                                                 \
            printf("\nByte %zu of %zu: expected %02x, got %02x\n", runner_at, runner_size, runner_expected[runner_at], \
                   runner_got[runner_at]);                                                                             \
            FAILm(#expected " != " #got);                                                                              \
        }                                                                                                              \
    } while (0)

TESTS_MAY_BE_UNUSED static void greatest_set_test_suffix(const char *suffix) { runner.suffix = suffix; }

static inline int runner_wanted(const char *filter, const char *name) {
    return (!filter || strstr(name, filter)) && !(runner.first_fail && runner.failed);
}

static inline void runner_report(const char *name, runner_result result) {
    static const char *const words[] = {"PASS", "FAIL", "SKIP"};
    unsigned *const counts[] = {&runner.passed, &runner.failed, &runner.skipped};
    *counts[result] += 1;
    const char *suffix = runner.suffix ? runner.suffix : "";
    if (runner.verbose || result == RUNNER_FAIL) {
        printf("%s%s %s%s%s", runner.verbose ? "" : "\n", words[result], name, *suffix ? "_" : "", suffix);
        if (result != RUNNER_PASS) printf(": %s (%s:%d)", runner.message, runner.file, runner.line);
        putchar('\n');
    } else {
        putchar(result == RUNNER_SKIP ? 's' : '.');
    }
    fflush(stdout);
    runner.suffix = NULL;
}

#define RUN_TEST(test)                                \
    do {                                              \
        if (runner_wanted(runner.test_filter, #test)) \
            runner_report(#test, test());             \
        else                                          \
            runner.suffix = NULL;                     \
    } while (0)
#define RUN_TESTp(test, ...)                          \
    do {                                              \
        if (runner_wanted(runner.test_filter, #test)) \
            runner_report(#test, test(__VA_ARGS__));  \
        else                                          \
            runner.suffix = NULL;                     \
    } while (0)
#define RUN_SUITE(suite)                                  \
    do {                                                  \
        if (runner_wanted(runner.suite_filter, #suite)) { \
            printf("* Suite " #suite ":\n");              \
            suite();                                      \
            putchar('\n');                                \
        }                                                 \
    } while (0)

static inline void runner_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(argv[i], "-v")) {
            runner.verbose = 1;
        } else if (!strcmp(argv[i], "-f")) {
            runner.first_fail = 1;
        } else if (!strcmp(argv[i], "-s") && value) {
            runner.suite_filter = value;
            i++;
        } else if (!strcmp(argv[i], "-t") && value) {
            runner.test_filter = value;
            i++;
        } else {
            fprintf(stderr, "usage: %s [-v] [-f] [-s SUITE] [-t TEST]\n", argv[0]);
            exit(2);
        }
    }
}

#define GREATEST_MAIN_DEFS()    typedef int runner_main_defs
#define GREATEST_MAIN_BEGIN()   runner_options(argc, argv)
#define GREATEST_PRINT_REPORT() printf("Pass: %u, fail: %u, skip: %u.\n", runner.passed, runner.failed, runner.skipped)
#define GREATEST_MAIN_END()                                 \
    do {                                                    \
        GREATEST_PRINT_REPORT();                            \
        return runner.failed ? EXIT_FAILURE : EXIT_SUCCESS; \
    } while (0)

struct greatest_report_t {
    unsigned passed, failed, skipped;
};
TESTS_MAY_BE_UNUSED static void greatest_get_report(struct greatest_report_t *report) {
    report->passed = runner.passed;
    report->failed = runner.failed;
    report->skipped = runner.skipped;
}

#endif

/* The whole program of one file of tests. */
#define TESTS_MAIN(suite)                                               \
    GREATEST_MAIN_DEFS();                                               \
    int main(int argc, char **argv) {                                   \
        struct greatest_report_t report = {0};                          \
        GREATEST_MAIN_BEGIN();                                          \
        RUN_SUITE(suite);                                               \
        GREATEST_PRINT_REPORT();                                        \
        greatest_get_report(&report);                                   \
        printf("%u passed, %u failed\n", report.passed, report.failed); \
        return report.failed ? EXIT_FAILURE : EXIT_SUCCESS;             \
    }                                                                   \
    typedef int tests_main_takes_a_semicolon

/* A message for ASSERTm with numbers in it, which may hold another one. */
TESTS_PRINTF(1, 2) static const char *note(const char *format, ...) {
    static char texts[2][512];
    static int turn;
    va_list arguments;
    va_start(arguments, format);
    turn = !turn;
    vsnprintf(texts[turn], sizeof texts[turn], format, arguments);
    va_end(arguments);
    return texts[turn];
}

TESTS_MAY_BE_UNUSED static void set_suffix(const char *suffix) {
    static char kept[128];
    snprintf(kept, sizeof kept, "%s", suffix);
    greatest_set_test_suffix(kept);
}

/* A test with arguments whose name goes on with `suffix`, which may be a note. */
#define RUN_NAMED(suffix, ...)  \
    do {                        \
        set_suffix(suffix);     \
        RUN_TESTp(__VA_ARGS__); \
    } while (0)

/* A test for each row of a table of things that have a name: FOR_EVERY(table, count, test, &table[i]) */
#define FOR_EVERY(table, count, ...) \
    for (int i = 0; i < (int)(count); i++) RUN_NAMED((table)[i].name, __VA_ARGS__)

#endif /* TESTS_RUNNER_H */
