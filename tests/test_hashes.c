/* Each kernel set of this CPU reproduces tests/hashes.txt, which all machines and versions share. */

#include "runner.h"
#include "hashes.h"

static hash_list expected, got;

TEST reproduces_the_hashes(const char *isa) {
    hash_all(isa, &got);
    int line = hash_difference(&expected, &got);
    ASSERTm(note("%s: %s", isa, line < 0 ? "" : got.lines[line < got.count ? line : 0].name), line < 0);
    PASS();
}

/* A sequence cut into calls has the hash of the one call. */
TEST cuts_have_the_hash_of_the_whole(void) {
    int pairs = 0;
    for (int i = 1; i < expected.count; i++) {
        if (!strstr(expected.lines[i].name, "out.cut")) continue;
        ASSERTm(expected.lines[i].name, expected.lines[i].hash == expected.lines[i - 1].hash);
        pairs++;
    }
    ASSERT_EQ_FMT(SHAPE_COUNT * (1 + ROUNDING_COUNT) + LONG_SHAPE_COUNT, pairs, "%d");
    PASS();
}

TEST the_file_of_hashes_is_there(void) {
    ASSERT(hash_read(&expected));
    PASS();
}

SUITE(hashes) {
    RUN_TEST(the_file_of_hashes_is_there);
    RUN_TEST(cuts_have_the_hash_of_the_whole);
    for (const char *isa = dsv4_isa_name(0); isa; isa = isa_after(isa)) {
        RUN_NAMED(isa, reproduces_the_hashes, isa);
    }
}

TESTS_MAIN(hashes);
