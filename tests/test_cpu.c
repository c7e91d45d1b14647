/* Which kernel sets a CPU is given: from what CPUID and XGETBV would say on it, and on this one. The header is included
 * as a static copy, for what it keeps to itself; without the kernels, which take long to compile. */

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DSV4__CPUID 1
#endif
#define DSV4_COMPRESSOR_SCALAR
#define DSV4_COMPRESSOR_STATIC
#define DSV4_COMPRESSOR_IMPLEMENTATION
#include "dsv4_compressor.h"

#include "implementation.h"
#include "runner.h"

#if defined(DSV4__CPUID)

enum { SETS = DSV4__CPU_AVX2 | DSV4__CPU_AVX512 | DSV4__CPU_BF16 | DSV4__CPU_AMX };

/* A CPU, signed as AMD's, with all that the kernels use, as its registers would say it. */
static dsv4__cpu able_cpu(void) {
    dsv4__cpu cpu;
    memset(&cpu, 0, sizeof cpu);
    cpu.leaf_0.a = 16;
    memcpy(&cpu.leaf_0.b, "Auth", 4);
    memcpy(&cpu.leaf_0.d, "enti", 4);
    memcpy(&cpu.leaf_0.c, "cAMD", 4);
    cpu.leaf_1.c = 1u << 12 | 1u << 27 | 1u << 28;
    cpu.leaf_7.a = 1;
    cpu.leaf_7.b = 1u << 5 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    cpu.leaf_7.d = 1u << 22 | 1u << 24;
    cpu.leaf_7_1.a = 1u << 5;
    cpu.kept = 0x600e7;
    return cpu;
}

/* One thing that an able CPU may lack, and the sets that are left then. */
typedef struct lack {
    const char *name;
    size_t at; /* the register's place in dsv4__cpu */
    uint32_t bit;
    unsigned left;
} lack;

#define REGISTER(name) offsetof(dsv4__cpu, name)
static const lack lacks[] = {
    {"FMA", REGISTER(leaf_1.c), 12, 0},
    {"a system that saves more than SSE", REGISTER(leaf_1.c), 27, 0},
    {"AVX", REGISTER(leaf_1.c), 28, 0},
    {"AVX2", REGISTER(leaf_7.b), 5, 0},
    {"SSE's state", REGISTER(kept), 1, 0},
    {"AVX's state", REGISTER(kept), 2, 0},
    {"AVX-512 F", REGISTER(leaf_7.b), 16, DSV4__CPU_AVX2},
    {"AVX-512 DQ", REGISTER(leaf_7.b), 17, DSV4__CPU_AVX2},
    {"AVX-512 BW", REGISTER(leaf_7.b), 30, DSV4__CPU_AVX2},
    {"AVX-512 VL", REGISTER(leaf_7.b), 31, DSV4__CPU_AVX2},
    {"the mask registers' state", REGISTER(kept), 5, DSV4__CPU_AVX2},
    {"the state of the upper halves", REGISTER(kept), 6, DSV4__CPU_AVX2},
    {"the state of registers 16 to 31", REGISTER(kept), 7, DSV4__CPU_AVX2},
    {"AVX512-BF16", REGISTER(leaf_7_1.a), 5, SETS & ~DSV4__CPU_BF16},
    {"AMX-BF16", REGISTER(leaf_7.d), 22, SETS & ~DSV4__CPU_AMX},
    {"AMX-TILE", REGISTER(leaf_7.d), 24, SETS & ~DSV4__CPU_AMX},
    {"the tiles' shapes in the state", REGISTER(kept), 17, SETS & ~DSV4__CPU_AMX},
    {"the tiles' rows in the state", REGISTER(kept), 18, SETS & ~DSV4__CPU_AMX},
    {"a second part of leaf 7", REGISTER(leaf_7.a), 0, SETS & ~DSV4__CPU_BF16},
};

TEST a_set_needs_all_it_is_made_of(void) {
    const dsv4__cpu able = able_cpu();
    ASSERT_EQ_FMT((unsigned)SETS, dsv4__cpu_offers(&able), "%#x");
    for (size_t i = 0; i < sizeof lacks / sizeof lacks[0]; i++) {
        dsv4__cpu cpu = able;
        uint32_t word;
        memcpy(&word, (char *)&cpu + lacks[i].at, sizeof word);
        word &= ~(1u << lacks[i].bit);
        memcpy((char *)&cpu + lacks[i].at, &word, sizeof word);
        ASSERTm(lacks[i].name, dsv4__cpu_offers(&cpu) == lacks[i].left);
    }
    PASS();
}

/* CPUs answer for a leaf that they do not have with what another says. */
TEST leaves_beyond_the_last_are_not_believed(void) {
    dsv4__cpu cpu = able_cpu();
    cpu.leaf_0.a = 6;
    ASSERT_EQ_FMT(0u, dsv4__cpu_offers(&cpu), "%#x");
    cpu.leaf_0.a = 7;
    ASSERT_EQ_FMT((unsigned)SETS, dsv4__cpu_offers(&cpu), "%#x");
    PASS();
}

TEST intels_bf16_is_the_slow_one(void) {
    dsv4__cpu cpu = able_cpu();
    memcpy(&cpu.leaf_0.b, "Genu", 4);
    memcpy(&cpu.leaf_0.d, "ineI", 4);
    memcpy(&cpu.leaf_0.c, "ntel", 4);
    ASSERT_EQ_FMT((unsigned)(SETS | DSV4__CPU_SLOW_BF16), dsv4__cpu_offers(&cpu), "%#x");
    PASS();
}

/* The sets for a CPU that offers this, in the order of their speed, as far as the tests were built with them. */
static const char *names_offered(unsigned offers) {
    static char names[256];
    const char *name;
    names[0] = 0;
    for (int i = 0; (name = isa_offered(offers, i)) != NULL; i++)
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s ", name);
    return names;
}

TEST a_slow_bf16_comes_behind_avx512(void) {
    const unsigned offers = DSV4__CPU_AVX2 | DSV4__CPU_AVX512 | DSV4__CPU_BF16;
    if (strstr(names_offered(offers), "avx512bf16") == NULL) SKIPm("built without avx512bf16");
    ASSERT_EQ(0, strncmp("avx512bf16 avx512 avx2 ", names_offered(offers), 23));
    ASSERT_EQ(0, strncmp("avx512 avx512bf16 avx2 ", names_offered(offers | DSV4__CPU_SLOW_BF16), 23));
    PASS();
}

#if defined(__GNUC__)
static int runs_bf16(void) {
#if defined(__clang__) || __GNUC__ >= 10
    return __builtin_cpu_supports("avx512bf16") != 0;
#else
    return (dsv4__offers(0) & DSV4__CPU_BF16) != 0; /* gcc 9 does not know the word */
#endif
}
#endif

TEST this_cpu_offers_what_the_compilers_runtime_says(void) {
#if defined(__GNUC__)
    if (!__builtin_cpu_supports("sse2")) SKIPm("the compiler's runtime knows no CPU");
    unsigned said = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) said |= DSV4__CPU_AVX2;
    if (said && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        said |= DSV4__CPU_AVX512;
    if ((said & DSV4__CPU_AVX512) && runs_bf16())
        said |= DSV4__CPU_BF16 | (__builtin_cpu_is("intel") ? DSV4__CPU_SLOW_BF16 : 0u);
    ASSERT_EQ_FMT(said, dsv4__offers(0), "%#x");
    PASS();
#else
    SKIPm("no __builtin_cpu_supports here");
#endif
}

SUITE(cpu) {
    RUN_TEST(a_set_needs_all_it_is_made_of);
    RUN_TEST(leaves_beyond_the_last_are_not_believed);
    RUN_TEST(intels_bf16_is_the_slow_one);
    RUN_TEST(a_slow_bf16_comes_behind_avx512);
    RUN_TEST(this_cpu_offers_what_the_compilers_runtime_says);
}

#else

TEST this_cpu_is_not_asked(void) {
    ASSERT_EQ_FMT(0u, dsv4__offers(0), "%#x");
    PASS();
}

SUITE(cpu) { RUN_TEST(this_cpu_is_not_asked); }

#endif

TESTS_MAIN(cpu);
