/* What went wrong for users of other implementations, each as a property that holds here. */

#include <float.h>

#include "runner.h"
#include "oracle_support.h"
#include "workbench.h"

enum { RATIO = 4, HIDDEN = 40, DIM = 24, ROPE = 8 };

static dsv4_config csa(void) {
    return (dsv4_config){.hidden_dim = HIDDEN, .head_dim = DIM, .ratio = RATIO, .rope_dim = ROPE, .overlap = 1};
}

/* Room for that many numbers. */
static float *floats(workbench *w, int64_t count) { return workbench_memory(w, (size_t)count * sizeof(float)); }

/* A call over any rows `x` instead of the sequence's own: entries to `out`. */
static dsv4_status compress_segments(const workbench *w, const float *x, const dsv4_segment *segments, int64_t count,
                                     float *out, int64_t entries) {
    dsv4_batch b = batch_reading(&w->s, entries, segments, count);
    b.x.data = x;
    b.out = matrix_of(out, DSV4_F32);
    b.drop_tail = 1;
    return workbench_compress(w, &b);
}

/* Entries of `count` of its tokens from token `first` on, as a sequence of its own. */
static float *entries_alone(workbench *w, int64_t first, int64_t count) {
    int64_t entries = count / w->config.ratio;
    float *out = floats(w, entries * w->config.head_dim);
    dsv4_segment alone = segment_new(first, count, 0, 0, NULL);
    if (compress_segments(w, w->s.x, &alone, 1, out, entries) != DSV4_OK) {
        fputs("tests: a plain call failed\n", stderr);
        exit(1);
    }
    return out;
}

static dsv4_status feed(const workbench *w, const float *x, int64_t first, int64_t count, dsv4_state *state,
                        float *out) {
    dsv4_segment part = segment_new(first, count, dsv4_state_tokens(state) ? dsv4_state_position(state) : 0,
                                    dsv4_state_tokens(state) / w->config.ratio, state);
    return compress_segments(w, x, &part, 1, out, w->entries);
}

/* ... token by token to the end. */
static dsv4_status decode(const workbench *w, int64_t first, dsv4_state *state, float *out) {
    dsv4_status status = DSV4_OK;
    for (int64_t t = first; t < w->s.tokens && status == DSV4_OK; t++) status = feed(w, w->s.x, t, 1, state, out);
    return status;
}

/* ---- Padding ----------------------------------------------------------------------------------------------- */

/* huggingface/transformers#45938, #46003: rows of a batch are padded to one length, and the compressor pooled the
 * padding into entries. Here a segment begins and ends where the real tokens do; the padding may hold anything. */
TEST padding_tokens_are_not_pooled_into_entries(void) {
    enum { ROWS = 3, LENGTH = 20 };
    static const struct { int64_t left, count; } rows[ROWS] = {{0, 20}, {7, 12}, {0, 9}};
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, ROWS * LENGTH, 1);
    float *padded = floats(&w, w.s.tokens * HIDDEN), out[ROWS * LENGTH / RATIO * DIM];
    dsv4_segment segments[ROWS];
    memcpy(padded, w.s.x, (size_t)(w.s.tokens * HIDDEN) * 4);
    for (int64_t row = 0; row < ROWS; row++) {
        for (int64_t t = 0; t < LENGTH; t++)
            if (t < rows[row].left || t >= rows[row].left + rows[row].count)
                for (int64_t k = 0; k < HIDDEN; k++) padded[(row * LENGTH + t) * HIDDEN + k] = NAN;
        segments[row] = segment_new(row * LENGTH + rows[row].left, rows[row].count, 0, row * LENGTH / RATIO, NULL);
    }
    ASSERT_EQ(DSV4_OK, compress_segments(&w, padded, segments, ROWS, out, ROWS * LENGTH / RATIO));
    for (int64_t row = 0; row < ROWS; row++) {
        float *alone = entries_alone(&w, segments[row].token, rows[row].count);
        ASSERT_MEM_EQ(alone, out + row * LENGTH / RATIO * DIM, (size_t)(rows[row].count / RATIO * DIM) * 4);
    }
    workbench_free(&w);
    PASS();
}

/* GDzhu01/vllm-ascend-deepseekv4#76: prompts are fed in buffers of a fixed size; where the real length was not passed,
 * entries were wrong from the first 4-token boundary on. */
TEST entries_after_the_first_boundary_are_right_for_every_real_length(void) {
    enum { BUFFER = 16, TOKENS = 32 };
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, TOKENS, 2);
    float *expected = entries_alone(&w, 0, TOKENS), *buffer = floats(&w, TOKENS * HIDDEN);
    const float *x = w.s.x;
    for (int64_t length = 1; length <= BUFFER; length++) {
        float out[TOKENS / RATIO * DIM];
        dsv4_state *state = workbench_state(&w, 0);
        for (int64_t i = 0; i < TOKENS * HIDDEN; i++) buffer[i] = i < length * HIDDEN ? x[i] : NAN;
        ASSERT_EQ(DSV4_OK, feed(&w, buffer, 0, length, state, out));
        ASSERT_EQ(DSV4_OK, decode(&w, length, state, out));
        ASSERT_MEM_EQ(expected, out, sizeof out);
    }
    workbench_free(&w);
    PASS();
}

/* ---- Speculation ------------------------------------------------------------------------------------------- */

/* vllm-ascend#9111: state rows were overwritten when more tokens were verified at once than a window has. Every
 * accepted prefix must go on as serial decoding does, however many drafts were verified. */
TEST many_speculative_tokens_verified_at_once_lose_no_rows(void) {
    enum { TOKENS = 64, START = 6, DRAFTS = 40 };
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, TOKENS, 3);
    float *expected = entries_alone(&w, 0, TOKENS);
    float *mixed = keep(&w, random_array(DSV4_F32, TOKENS * HIDDEN, 4, 1)); /* wrong drafts after the accepted ones */
    for (int64_t accepted = 0; accepted <= DRAFTS; accepted++) {
        float out[TOKENS / RATIO * DIM];
        dsv4_state *state = workbench_state(&w, DRAFTS);
        memcpy(mixed, w.s.x, (size_t)((START + accepted) * HIDDEN) * 4);
        ASSERT_EQ(DSV4_OK, feed(&w, w.s.x, 0, START, state, out));
        ASSERT_EQ(DSV4_OK, feed(&w, mixed, START, DRAFTS, state, out));
        ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(state, DRAFTS - accepted, NULL));
        ASSERT_EQ(DSV4_OK, decode(&w, START + accepted, state, out));
        ASSERTm(note("%d accepted", (int)accepted), !memcmp(expected, out, sizeof out));
    }
    workbench_free(&w);
    PASS();
}

/* llama.cpp#26741, #26756: with several sequences decoding side by side, a rejected draft restored the state of the
 * wrong sequence, and text turned to garbage. */
TEST roll_back_restores_the_sequence_it_was_asked_for(void) {
    enum { SEQUENCES = 4, TOKENS = 40, DRAFTS = 6 };
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, SEQUENCES * TOKENS, 5);
    const float *x = w.s.x, *drafts = keep(&w, random_array(DSV4_F32, w.s.tokens * HIDDEN, 6, 1));
    float *mixed = floats(&w, w.s.tokens * HIDDEN);
    float out[SEQUENCES * TOKENS / RATIO * DIM];
    dsv4_state *states[SEQUENCES];
    int64_t done[SEQUENCES] = {0};
    dice d = {7};
    for (int i = 0; i < SEQUENCES; i++) states[i] = workbench_state(&w, DRAFTS);
    for (int unfinished = 1; unfinished;) {
        dsv4_segment segments[SEQUENCES];
        int64_t kept[SEQUENCES] = {0}, fed[SEQUENCES] = {0};
        int count = 0;
        for (int i = 0; i < SEQUENCES; i++) {
            int64_t first = i * TOKENS + done[i];
            fed[i] = done[i] + DRAFTS <= TOKENS ? DRAFTS : TOKENS - done[i];
            kept[i] = fed[i] ? 1 + dice_below(&d, fed[i]) : 0;
            memcpy(mixed + first * HIDDEN, x + first * HIDDEN, (size_t)(kept[i] * HIDDEN) * 4);
            memcpy(mixed + (first + kept[i]) * HIDDEN, drafts + (first + kept[i]) * HIDDEN,
                   (size_t)((fed[i] - kept[i]) * HIDDEN) * 4);
            if (fed[i] > 0)
                segments[count++] = segment_new(first, fed[i], done[i], (i * TOKENS + done[i]) / RATIO, states[i]);
        }
        ASSERT_EQ(DSV4_OK, compress_segments(&w, mixed, segments, count, out, w.s.tokens / RATIO));
        unfinished = 0;
        for (int i = SEQUENCES - 1; i >= 0; i--) {
            ASSERT_EQ(DSV4_OK, dsv4_state_roll_back(states[i], fed[i] - kept[i], NULL));
            done[i] += kept[i];
            unfinished |= done[i] < TOKENS;
        }
    }
    for (int i = 0; i < SEQUENCES; i++) {
        float *expected = entries_alone(&w, i * TOKENS, TOKENS);
        ASSERT_MEM_EQ(expected, out + i * TOKENS / RATIO * DIM, (size_t)(TOKENS / RATIO * DIM) * 4);
    }
    workbench_free(&w);
    PASS();
}

/* ---- RoPE -------------------------------------------------------------------------------------------------- */

/* latent and out [D] of one window that begins at `position`. */
static dsv4_status rotate(const dsv4_config *config, int64_t position, float *latent, float *out) {
    workbench w = workbench_for(config, DSV4_F32, config->ratio, 8);
    dsv4_segment one = segment_new(0, config->ratio, position, 0, NULL);
    dsv4_batch b = batch_reading(&w.s, 1, &one, 1);
    b.out = matrix_of(out, DSV4_F32);
    b.stages.latent = latent;
    dsv4_status status = workbench_compress(&w, &b);
    workbench_free(&w);
    return status;
}

/* mlx-lm#1189: compressed layers took the base of the sliding window (10000), or compressed keys were not rotated at
 * all: fine below 128 tokens, garbage beyond. */
TEST entries_are_rotated_with_the_base_of_compressed_layers_at_any_position(void) {
    static const int64_t positions[] = {0, 4, 124, 128, 132, 4096, 65532, 65536, 131072, 1000000, 1048572};
    for (size_t i = 0; i < sizeof positions / sizeof *positions; i++) {
        dsv4_config c = csa();
        float latent[DIM], out[DIM], short_base[DIM];
        ASSERT_EQ(DSV4_OK, rotate(&c, positions[i], latent, out));
        ASSERT_MEM_EQ(latent, out, (DIM - ROPE) * sizeof *out);
        for (int k = DIM - ROPE; k < DIM; k += 2) {
            float inv_freq = 1 / (float)pow(160000, (double)(k - (DIM - ROPE)) / (double)ROPE);
            double angle = (double)((float)positions[i] * inv_freq), a = (double)latent[k], b = (double)latent[k + 1];
            ASSERT_IN_RANGE(a * cos(angle) - b * sin(angle), (double)out[k], 1e-6);
            ASSERT_IN_RANGE(b * cos(angle) + a * sin(angle), (double)out[k + 1], 1e-6);
        }
        c.rope_theta = 10000;
        ASSERT_EQ(DSV4_OK, rotate(&c, positions[i], latent, short_base));
        if (positions[i] >= 128) ASSERT(memcmp(short_base, out, sizeof out) != 0);
        if (positions[i] > 0) ASSERT(memcmp(latent, out, sizeof out) != 0);
    }
    PASS();
}

/* NeMo Automodel's layers.py turned channel i with channel i + R/2: plausible output, cosine 0.87 to the reference. */
TEST rope_turns_interleaved_pairs_not_halves(void) {
    dsv4_config c = csa();
    float latent[DIM], out[DIM];
    const float *before = latent + DIM - ROPE, *after = out + DIM - ROPE;
    ASSERT_EQ(DSV4_OK, rotate(&c, 1, latent, out)); /* the first pair turns by one radian */
    ASSERT_IN_RANGE(before[0] * cos(1) - before[1] * sin(1), (double)after[0], 1e-6);
    ASSERT_IN_RANGE(before[1] * cos(1) + before[0] * sin(1), (double)after[1], 1e-6);
    double half_split = before[0] * cos(1) - before[ROPE / 2] * sin(1);
    ASSERTm("the test could not tell", fabs(half_split - (double)after[0]) > 1e-2);
    /* A turn keeps the length of each pair. */
    for (int k = 0; k < ROPE; k += 2)
        ASSERT_IN_RANGE(before[k] * before[k] + before[k + 1] * before[k + 1],
                        (double)(after[k] * after[k] + after[k + 1] * after[k + 1]), 1e-5);
    PASS();
}

/* ---- Windows ----------------------------------------------------------------------------------------------- */

/* MaxText's overlap pooling took an all-zero state for an absent one, so that a real window of zeros was not
 * counted. */
TEST a_real_window_of_zeros_counts(void) {
    enum { TOKENS = 3 * RATIO };
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, TOKENS, 9);
    memset(w.s.x, 0, RATIO * HIDDEN * sizeof(float));
    results r = workbench_results(&w), cut = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&w.e, &w.s, &r, NULL));
    stray_number v = oracle_judge(&w.m, &w.s, &r);
    ASSERTm(stage_name(v.stage), v.stage == STAGE_COUNT);
    for (int64_t i = 0; i < RATIO * DIM; i++) {
        ASSERT_EQ_FMT(0.0, result(&r, STAGE_WEIGHTS, i), "%g");     /* what window 0 lacks */
        ASSERT(result(&r, STAGE_WEIGHTS, 2 * RATIO * DIM + i) > 0); /* the zeros before window 1 */
    }
    const int64_t window = RATIO;
    ASSERT_EQ(DSV4_OK, compress_cut(&w.e, &w.s, &cut, &window, 1, NULL));
    ASSERT_EQ(STAGE_COUNT, results_difference(&r, &cut));
    workbench_free(&w);
    PASS();
}

/* Packed training: windows were laid over the pack, from its first token, and pooled across document boundaries. */
TEST windows_are_laid_from_each_documents_first_token(void) {
    static const int64_t lengths[] = {6, 9, 4, 3, 11, 7};
    enum { DOCUMENTS = 6, TOKENS = 40 };
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, TOKENS, 10);
    dsv4_segment segments[DOCUMENTS];
    int64_t token = 0, entry = 0;
    for (int i = 0; i < DOCUMENTS; i++) {
        segments[i] = segment_new(token, lengths[i], 0, entry, NULL);
        token += lengths[i];
        entry += lengths[i] / RATIO;
    }
    float out[TOKENS / RATIO * DIM], again[TOKENS / RATIO * DIM];
    ASSERT_EQ(DSV4_OK, compress_segments(&w, w.s.x, segments, DOCUMENTS, out, TOKENS / RATIO));
    for (int i = 0; i < DOCUMENTS; i++) {
        float *alone = entries_alone(&w, segments[i].token, lengths[i]);
        ASSERT_MEM_EQ(alone, out + segments[i].entry * DIM, (size_t)(lengths[i] / RATIO * DIM) * 4);
    }
    /* Whatever stands in one document, the entries of the others stay as they are. */
    for (int64_t i = 0; i < 9 * HIDDEN; i++) ((float *)w.s.x)[6 * HIDDEN + i] += 1;
    ASSERT_EQ(DSV4_OK, compress_segments(&w, w.s.x, segments, DOCUMENTS, again, TOKENS / RATIO));
    ASSERT_MEM_EQ(out, again, 1 * DIM * sizeof *out);
    ASSERT(memcmp(out + DIM, again + DIM, DIM * sizeof *out) != 0);
    ASSERT_MEM_EQ(out + 3 * DIM, again + 3 * DIM, (size_t)(entry - 3) * DIM * sizeof *out);
    workbench_free(&w);
    PASS();
}

/* NeMo Automodel#2658: two masks near the lowest number summed to -inf in bf16, and softmax over them gave NaN. */
TEST very_negative_scores_never_make_nan(void) {
    static const float pads[] = {-1e4f, -1e30f, -FLT_MAX, -INFINITY};
    static const uint32_t points[] = {DSV4_ROUNDING_NONE, DSV4_ROUNDING_MAXTEXT, DSV4_ROUNDING_TRANSFORMERS_5_8};
    float first[3][DIM];
    for (int pad = 0; pad < 4; pad++) {
        for (int rounding = 0; rounding < 3; rounding++) {
            dsv4_config c = csa();
            c.pad_gate = pads[pad];
            c.rounding = points[rounding];
            workbench w = workbench_for(&c, DSV4_F32, 2 * RATIO, 11);
            float *ape = w.m.data[DSV4_APE]; /* the previous window's rows, and one of the own, as good as masked */
            for (int64_t i = 0; i < RATIO * 2 * DIM; i++)
                if (i % (2 * DIM) < DIM || i < 2 * DIM) ape[i] = -3.3e38f;
            w.e = workbench_engine(&w, NULL, NULL);
            float kv[2 * RATIO * 2 * DIM], gate[2 * RATIO * 2 * DIM], out[2 * DIM];
            for (int i = 0; i < 2 * RATIO * 2 * DIM; i++) {
                kv[i] = (float)(i % 7) - 3;
                gate[i] = i % (2 * DIM) < DIM || i / (2 * DIM) % RATIO == 0 ? -3.3e38f : (float)(i % 5);
            }
            const dsv4_batch b = {.kv = kv, .gate = gate, .tokens = 2 * RATIO, .out = {out, DSV4_F32, 0}, .entries = 2};
            ASSERT_EQ(DSV4_OK, workbench_compress(&w, &b));
            for (int i = 0; i < 2 * DIM; i++) ASSERTm(note("pad %g, out[%d]", (double)pads[pad], i), isfinite(out[i]));
            if (pad == 0) memcpy(first[rounding], out, sizeof first[rounding]);
            ASSERT_MEM_EQ(first[rounding], out, sizeof first[rounding]);
            workbench_free(&w);
        }
    }
    PASS();
}

/* ---- Caches and memory ------------------------------------------------------------------------------------- */

/* vllm-ascend#15204: prefix caches and paged states with blocks that neither ratio divides. A state is saved at every
 * block boundary, and any of them can be taken up again. */
TEST a_prefix_cache_may_use_any_block_size(void) {
    static const int64_t blocks[] = {1, 3, 5, 16, 17, 30}, ratios[] = {4, 16};
    enum { TOKENS = 64 };
    for (int i = 0; i < 12; i++) {
        dsv4_config c = csa();
        c.ratio = ratios[i / 6];
        c.overlap = c.ratio == 4;
        workbench w = workbench_for(&c, DSV4_F32, TOKENS, 12);
        int64_t block = blocks[i % 6], entries = TOKENS / c.ratio;
        float *expected = entries_alone(&w, 0, TOKENS), *out = floats(&w, entries * DIM);
        dsv4_state *writer = workbench_state(&w, 0), *reader = workbench_state(&w, 0);
        for (int64_t t = 0; t + block <= TOKENS; t += block) {
            ASSERT_EQ(DSV4_OK, feed(&w, w.s.x, t, block, writer, out));
            const saved page = workbench_saved(&w, writer);
            ASSERT_EQ(DSV4_OK, dsv4_state_restore(reader, page.bytes, page.size, NULL));
            float *resumed = floats(&w, entries * DIM);
            memcpy(resumed, expected, (size_t)((t + block) / c.ratio * DIM) * 4);
            ASSERT_EQ(DSV4_OK, feed(&w, w.s.x, t + block, TOKENS - t - block, reader, resumed));
            ASSERT_MEM_EQ(expected, resumed, (size_t)(entries * DIM) * 4);
        }
        workbench_free(&w);
    }
    PASS();
}

/* Bytes of a published model's state; 0 where it is refused. */
static size_t state_bytes(dsv4_preset preset, int64_t depth) {
    dsv4_config c = dsv4_preset_config(preset);
    size_t bytes = 0;
    c.hidden_dim = 2; /* what a state holds is of head_dim's width */
    workbench w = workbench_for(&c, DSV4_BF16, 0, 1);
    if (dsv4_state_size(w.e.compressor, depth, &bytes, NULL) != DSV4_OK) bytes = 0;
    workbench_free(&w);
    return bytes;
}

/* vllm-ascend#16270, vLLM#48118: states far larger than what they wait for. At the sizes of V4-Flash and V4.1. */
TEST states_are_no_larger_than_the_tokens_they_wait_for(void) {
    static const struct {
        dsv4_preset preset;
        size_t most, row;                              /* bytes without a roll-back's reach, and of each token of it */
    } states[] = {{DSV4_V4_FLASH_CSA, 12902, 8192},    /* 12.6 KiB */
                  {DSV4_V4_FLASH_HCA, 6656, 4096},     /* 6.5 KiB */
                  {DSV4_V4_FLASH_INDEXER, 3379, 2048}, /* 3.3 KiB */
                  {DSV4_V41_FLASH_RATIO2, 4096 + 256, 4096},
                  {DSV4_V41_FLASH_RATIO1, 256, 0}};
    for (int i = 0; i < 5; i++)
        for (int64_t depth = 0; depth <= 8; depth += 8) {
            const size_t bytes = state_bytes(states[i].preset, depth);
            const size_t most = states[i].most + (size_t)depth * states[i].row;
            ASSERTm(note("%s: %zu bytes, not %zu", dsv4_preset_name(states[i].preset), bytes, most),
                    bytes > 0 && bytes <= most);
        }
    PASS();
}

/* vLLM#48118, sglang#29609: gigabytes of states. A sequence over all layers, as README says; CSA has its indexer
 * beside it. */
TEST states_of_a_whole_model_take_what_is_said(void) {
    static const struct {
        int csa, hca;
        size_t bytes[2]; /* at depth 0 and 8 */
    } models[] = {{21, 20, {457344, 2833024}}, {30, 31, {668736, 4142144}}};
    static const dsv4_preset presets[] = {DSV4_V4_FLASH_CSA, DSV4_V4_FLASH_INDEXER, DSV4_V4_FLASH_HCA};
    for (int i = 0; i < 2; i++)
        for (int64_t depth = 0; depth <= 8; depth += 8) {
            size_t sum = 0;
            for (int k = 0; k < 3; k++) {
                const size_t bytes = state_bytes(presets[k], depth);
                ASSERT(bytes > 0);
                sum += bytes * (size_t)(k < 2 ? models[i].csa : models[i].hca);
            }
            if (sizeof(void *) == 8) ASSERT_EQ_FMT((unsigned)models[i].bytes[depth / 8], (unsigned)sum, "%u");
            ASSERT(sum <= models[i].bytes[depth / 8]);
        }
    PASS();
}

/* llama.cpp#27680: compute buffers grew with the batch. Here scratch is known before any batch is, and a call over
 * thousands of tokens stays within it. */
TEST scratch_does_not_grow_with_the_batch(void) {
    enum { TOKENS = 8000, GUARD = 4096 };
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, TOKENS, 13);
    size_t bytes = 0;
    ASSERT_EQ(DSV4_OK, dsv4_workspace_size(w.e.compressor, 1, &bytes, NULL));
    unsigned char *memory = workbench_memory(&w, bytes + DSV4_ALIGNMENT + GUARD);
    unsigned char *aligned = memory + (DSV4_ALIGNMENT - (uintptr_t)memory % DSV4_ALIGNMENT) % DSV4_ALIGNMENT;
    memset(aligned, POISON, bytes + GUARD);
    dsv4_arena arena = dsv4_arena_init(aligned, bytes);
    dsv4_allocator from_arena = dsv4_arena_allocator(&arena);
    dsv4_workspace *workspace = NULL;
    ASSERT_EQ(DSV4_OK, dsv4_workspace_create(w.e.compressor, NULL, &from_arena, &workspace, NULL));
    engine small = {w.e.compressor, workspace};
    results r = workbench_results(&w);
    ASSERT_EQ(DSV4_OK, compress_whole(&small, &w.s, &r, NULL));
    ASSERT(memory_untouched(aligned + bytes, GUARD));
    ASSERT_EQ_FMT((unsigned)bytes, (unsigned)arena.used, "%u");
    dsv4_workspace_destroy(workspace);
    workbench_free(&w);
    PASS();
}

/* colibri#727, #1119: consumer CPUs, which have no AVX-512, fell to scalar code. */
TEST cpus_without_avx512_have_vector_kernels(void) {
    int listed = 0, scalar_at = -1, count = 0;
    const char *isa, *wanted = NULL;
#if defined(__GNUC__) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) wanted = "avx2";
#elif defined(__GNUC__) && defined(__aarch64__)
    wanted = "neon";
#endif
    for (; (isa = dsv4_isa_name(count)) != NULL; count++) {
        if (wanted && !strcmp(isa, wanted)) listed = 1;
        if (!strcmp(isa, "scalar")) scalar_at = count;
    }
    ASSERT_EQ_FMT(count - 1, scalar_at, "%d"); /* the last resort, always there */
    if (!wanted) SKIPm("this CPU has neither AVX2 nor NEON");
    ASSERTm(wanted, listed);
    const dsv4_config c = csa();
    workbench w = workbench_for(&c, DSV4_F32, RATIO, 14);
    ASSERT_STR_EQ(best_isa(c.sums), dsv4_compressor_isa(w.e.compressor));
    ASSERT(strcmp(dsv4_compressor_isa(w.e.compressor), "scalar") != 0);
    workbench_free(&w);
    PASS();
}

#if defined(__x86_64__) && (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10 && !defined(_WIN32)))
#define TESTS_KNOW_THE_SETS
/* Whether this CPU has what a kernel set is made of; sets that are for any CPU aside. */
static int runs(const char *isa) {
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
    return avx512 && __builtin_cpu_supports("avx512bf16");
}
#endif

/* None that it could run is left out, none that it could not is listed. Intel's bf16 dot product is the slower way. */
TEST a_cpu_is_given_the_kernel_sets_it_can_run(void) {
#if defined(TESTS_KNOW_THE_SETS)
    const char *intel[] = {"avx512", "avx512bf16", "avx2"}, *others[] = {"avx512bf16", "avx512", "avx2"};
    const char **order = __builtin_cpu_is("intel") ? intel : others;
    int count = !strcmp(dsv4_isa_name(0), "amx"); /* test_cpu knows when */
    for (int i = 0; i < 3; i++) {
        if (!runs(order[i])) continue;
        ASSERTm(order[i], dsv4_isa_name(count) != NULL);
        ASSERT_STR_EQ(order[i], dsv4_isa_name(count));
        count++;
    }
    for (const char *isa; (isa = dsv4_isa_name(count)) != NULL; count++)
        ASSERTm(isa, !strcmp(isa, "scalar") || !strcmp(isa, "simde") || !strcmp(isa, "amx-model"));
    PASS();
#else
    SKIPm("the sets of this CPU are not known here");
#endif
}

SUITE(serving) {
    RUN_TEST(padding_tokens_are_not_pooled_into_entries);
    RUN_TEST(many_speculative_tokens_verified_at_once_lose_no_rows);
    RUN_TEST(roll_back_restores_the_sequence_it_was_asked_for);
    RUN_TEST(entries_after_the_first_boundary_are_right_for_every_real_length);
    RUN_TEST(entries_are_rotated_with_the_base_of_compressed_layers_at_any_position);
    RUN_TEST(rope_turns_interleaved_pairs_not_halves);
    RUN_TEST(a_real_window_of_zeros_counts);
    RUN_TEST(windows_are_laid_from_each_documents_first_token);
    RUN_TEST(very_negative_scores_never_make_nan);
    RUN_TEST(a_prefix_cache_may_use_any_block_size);
    RUN_TEST(states_are_no_larger_than_the_tokens_they_wait_for);
    RUN_TEST(states_of_a_whole_model_take_what_is_said);
    RUN_TEST(cpus_without_avx512_have_vector_kernels);
    RUN_TEST(a_cpu_is_given_the_kernel_sets_it_can_run);
    RUN_TEST(scratch_does_not_grow_with_the_batch);
}

TESTS_MAIN(serving);
