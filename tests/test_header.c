/* A static copy of the library within this file, of the scalar kernels alone and with an assert of its own, beside the
 * shared one that every test program is linked with. */

static long asserts_held;
#define DSV4_ASSERT(condition) ((condition) ? (void)asserts_held++ : abort())
#define DSV4_COMPRESSOR_STATIC
#define DSV4_COMPRESSOR_SCALAR
#define DSV4_COMPRESSOR_IMPLEMENTATION
#define v_add 7 /* short names stay their users' */
#define v_mm  8
#include <stdlib.h>
#include "dsv4_compressor.h"
#include "dsv4_compressor.h" /* twice, as two headers of a user may */

#if v_add != 7 || v_mm != 8
#error "the header takes its users' names"
#endif

#include "runner.h"
#include "hashes.h"

TEST the_static_copy_has_the_kernels_it_was_asked_for(void) {
    ASSERT_STR_EQ("scalar", dsv4_isa_name(0));
    ASSERT_EQ(NULL, dsv4_isa_name(1));
    PASS();
}

TEST the_static_copy_reproduces_the_hashes_of_the_shared_one(void) {
    static hash_list expected, got;
    ASSERT(hash_read(&expected));
    hash_all("scalar", &got);
    int line = hash_difference(&expected, &got);
    ASSERTm(line < 0 ? "" : got.lines[line].name, line < 0);
    PASS();
}

TEST asserts_are_the_users_own(void) {
    ASSERT(asserts_held > 0);
    PASS();
}

TEST the_version_reads_as_three_numbers(void) {
    int major = -1, middle = -1, minor = -1, end = 0;
    ASSERT_EQ(3, sscanf(DSV4_COMPRESSOR_VERSION, "%d.%d.%d%n", &major, &middle, &minor, &end));
    ASSERT_EQ_FMT((int)strlen(DSV4_COMPRESSOR_VERSION), end, "%d");
    PASS();
}

SUITE(header) {
    RUN_TEST(the_static_copy_has_the_kernels_it_was_asked_for);
    RUN_TEST(the_static_copy_reproduces_the_hashes_of_the_shared_one);
    RUN_TEST(asserts_are_the_users_own);
    RUN_TEST(the_version_reads_as_three_numbers);
}

TESTS_MAIN(header);
