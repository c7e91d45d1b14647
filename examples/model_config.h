/* model_config.h - what a model's config.json says of its compressors' RoPE and norm.  As DeepSeek releases it
 * (`compress_rope_theta`, `rope_scaling`), as its inference code has it (`rope_factor`, `original_seq_len`,
 * `rope_head_dim`, `norm_eps`), as transformers writes it (`rope_parameters`, flat or with the parts `main` and
 * `compress`), and either as the `text_config` of a model that sees pictures too. */

#ifndef MODEL_CONFIG_H
#define MODEL_CONFIG_H

#include "safetensors.h"

#include <math.h>

enum {
    MODEL_ROPE_THETA,
    MODEL_ROPE_DIM,
    MODEL_YARN_FACTOR,
    MODEL_YARN_CONTEXT,
    MODEL_YARN_FAST,
    MODEL_YARN_SLOW,
    MODEL_EPS,
    MODEL_SETTINGS
};

/* Settings as text, NULL where the file does not say. */
typedef struct model_config {
    const char *setting[MODEL_SETTINGS];
    char *text; /* the file's strings */
    char rope_dim[32];
} model_config;

/* 0, or -1 with a line in `message`; model_config_close in either case. */
static inline int model_config_open(model_config *c, const char *path, char *message, size_t message_size);

/* The same for a file's bytes in memory. */
static inline int model_config_parse(model_config *c, const char *path, const void *bytes, size_t size, char *message,
                                     size_t message_size);

/* By the setting's name: rope_theta, rope_dim, yarn_factor, ... */
static inline const char *model_config_setting(const model_config *c, const char *key);
static inline void model_config_close(model_config *c);

/* ---- Reading ----------------------------------------------------------------------------------------------- */

enum { MODEL_FACTOR, MODEL_CONTEXT, MODEL_FAST, MODEL_SLOW, MODEL_ATTENTION, MODEL_THETA, MODEL_PARTIAL, MODEL_ROPE };
enum { MODEL_COMPRESS_THETA, MODEL_NORM_EPS, MODEL_QK_ROPE, MODEL_WHOLE_PARTIAL, MODEL_HEAD_DIM, MODEL_NUMBERS };

/* rope_parameters or rope_scaling, a part of it, or fields that say the same. */
typedef struct model__rope {
    int given;
    int parts; /* objects in it */
    const char *type, *old_type, *number[MODEL_ROPE];
} model__rope;

typedef struct model__fields {
    int given;
    const char *number[MODEL_NUMBERS];
    model__rope rope[2], compress[2]; /* of rope_parameters and rope_scaling; their parts `compress` */
    model__rope inference;            /* among the other fields, as DeepSeek's inference code has them */
} model__fields;

static inline int model__index(const char *key, const char *const *names, int count) {
    int i = 0;
    while (i < count && strcmp(key, names[i]) != 0) i++;
    return i;
}

/* null is the same as nothing. */
static inline int model__read_number(json *j, const char **number) {
    if (json_word(j, "null")) return 0;
    return *number ? json_bad(j, "this stands twice") : json_number(j, number);
}

static inline int model__read_string(json *j, const char **string) {
    if (json_word(j, "null")) return 0;
    return *string ? json_bad(j, "this stands twice") : json_string(j, string);
}

static inline int model__read_rope_member(json *j, const char *key, model__rope *rope) {
    static const char *const names[MODEL_ROPE] = {"factor",
                                                  "original_max_position_embeddings",
                                                  "beta_fast",
                                                  "beta_slow",
                                                  "attention_factor",
                                                  "rope_theta",
                                                  "partial_rotary_factor"};
    const int i = model__index(key, names, MODEL_ROPE);
    if (i < MODEL_ROPE) return model__read_number(j, &rope->number[i]);
    if (strcmp(key, "rope_type") == 0) return model__read_string(j, &rope->type);
    return strcmp(key, "type") == 0 ? model__read_string(j, &rope->old_type) : json_skip(j);
}

/* The part `compress` of a rope_parameters. */
static inline int model__read_part(json *j, model__rope *part) {
    const char *key;
    int more;
    if (json_word(j, "null")) return 0;
    if (part->given++) return json_bad(j, "this stands twice");
    for (int n = 0; (more = json_member(j, &n, &key)) > 0;) {
        if (model__read_rope_member(j, key, part)) return -1;
    }
    return more;
}

static inline int model__read_rope(json *j, model__rope *rope, model__rope *part) {
    const char *key;
    int more;
    if (json_word(j, "null")) return 0;
    if (rope->given++) return json_bad(j, "this stands twice");
    for (int n = 0; (more = json_member(j, &n, &key)) > 0;) {
        const int parted = strcmp(key, "compress") == 0;
        rope->parts += json_peek(j) == '{';
        if (parted ? model__read_part(j, part) : model__read_rope_member(j, key, rope)) return -1;
    }
    return more;
}

static inline int model__read_member(json *j, const char *key, model__fields *f) {
    static const char *const names[MODEL_NUMBERS] = {"compress_rope_theta", "rms_norm_eps", "qk_rope_head_dim",
                                                     "partial_rotary_factor", "head_dim"};
    static const char *const ropes[2] = {"rope_parameters", "rope_scaling"};
    static const char *const inference[4] = {"rope_factor", "original_seq_len", "beta_fast", "beta_slow"};
    const int i = model__index(key, names, MODEL_NUMBERS), rope = model__index(key, ropes, 2);
    const int own = model__index(key, inference, 4);
    if (i < MODEL_NUMBERS) return model__read_number(j, &f->number[i]);
    if (own < 4) return model__read_number(j, &f->inference.number[own]);
    if (strcmp(key, "norm_eps") == 0) return model__read_number(j, &f->number[MODEL_NORM_EPS]);
    if (strcmp(key, "rope_head_dim") == 0) return model__read_number(j, &f->number[MODEL_QK_ROPE]);
    return rope < 2 ? model__read_rope(j, &f->rope[rope], &f->compress[rope]) : json_skip(j);
}

static inline int model__read_text(json *j, model__fields *text) {
    const char *key;
    int more;
    if (text->given++) return json_bad(j, "this stands twice");
    for (int n = 0; (more = json_member(j, &n, &key)) > 0;) {
        if (model__read_member(j, key, text)) return -1;
    }
    return more;
}

/* `text`: where a text_config goes. */
static inline int model__read_fields(json *j, model__fields *f, model__fields *text) {
    const char *key;
    int more;
    for (int n = 0; (more = json_member(j, &n, &key)) > 0;) {
        const int nested = strcmp(key, "text_config") == 0 && json_peek(j) == '{';
        if (nested ? model__read_text(j, text) : model__read_member(j, key, f)) return -1;
    }
    return more;
}

/* ---- What it means ----------------------------------------------------------------------------------------- */

/* What DeepSeek's inference code has beside its other settings: YaRN, unless there is no original context. */
static inline void model__settle_inference(model__rope *rope) {
    const char *context = rope->number[MODEL_CONTEXT];
    if (!context) return;
    if (strtod(context, NULL) > 0) {
        rope->type = "yarn";
    } else {
        memset(rope, 0, sizeof *rope);
    }
}

/* YaRN, or none. The point of each refusal: whatever else is said would be ignored, and entries be wrong. */
static inline int model__settle_rope(model_config *c, const model__rope *rope, json *j) {
    const char *type = rope->type ? rope->type : rope->old_type, *const *number = rope->number;
    if (!type && number[MODEL_FACTOR]) {
        return json_fail(j->message, j->message_size, "%s: a RoPE factor without a rope_type", j->name);
    }
    if (type && strcmp(type, "yarn") != 0 && strcmp(type, "default") != 0) {
        return json_fail(j->message, j->message_size, "%s: rope_type '%.40s'; default and yarn are known here", j->name,
                         type);
    }
    if (number[MODEL_ATTENTION] && strtod(number[MODEL_ATTENTION], NULL) != 1) {
        return json_fail(j->message, j->message_size, "%s: attention_factor %.40s; a compressor's RoPE has 1", j->name,
                         number[MODEL_ATTENTION]);
    }
    c->setting[MODEL_YARN_FACTOR] = "1";
    if (!type || strcmp(type, "yarn") != 0) return 0;
    if (!number[MODEL_FACTOR] || !number[MODEL_CONTEXT]) {
        return json_fail(j->message, j->message_size, "%s: yarn without %s", j->name,
                         number[MODEL_FACTOR] ? "original_max_position_embeddings" : "a factor");
    }
    c->setting[MODEL_YARN_FACTOR] = number[MODEL_FACTOR];
    c->setting[MODEL_YARN_CONTEXT] = number[MODEL_CONTEXT];
    c->setting[MODEL_YARN_FAST] = number[MODEL_FAST];
    c->setting[MODEL_YARN_SLOW] = number[MODEL_SLOW];
    return 0;
}

/* rope_dim itself, or as a part of the attention's head_dim, which is not the indexer's. */
static inline int model__settle_rope_dim(model_config *c, const char *const *number, const char *partial, json *j) {
    const char *head_dim = number[MODEL_HEAD_DIM], *given = number[MODEL_QK_ROPE];
    c->setting[MODEL_ROPE_DIM] = given;
    if (!partial || (given && !head_dim)) return 0;
    if (!head_dim) {
        return json_fail(j->message, j->message_size, "%s: a partial_rotary_factor without a head_dim", j->name);
    }
    const double product = strtod(partial, NULL) * strtod(head_dim, NULL), whole = floor(product + 0.5);
    if (!(fabs(product - whole) < 1e-6) || !(whole >= 0 && whole < 1e9) || (given && strtod(given, NULL) != whole)) {
        return json_fail(j->message, j->message_size, "%s: partial_rotary_factor %.40s of head_dim %.40s is not %.40s",
                         j->name, partial, head_dim, given ? given : "a whole number");
    }
    snprintf(c->rope_dim, sizeof c->rope_dim, "%.0f", whole);
    c->setting[MODEL_ROPE_DIM] = c->rope_dim;
    return 0;
}

static inline int model__settle(model_config *c, const model__fields *f, json *j) {
    const int older = !f->rope[0].given, parted = f->compress[older].given;
    const int released = f->rope[0].given || f->rope[1].given;
    const model__rope *rope = !released ? &f->inference : parted ? &f->compress[older] : &f->rope[older];
    /* The base of a flat rope_parameters is that of the other layers. */
    const char *theta = f->number[MODEL_COMPRESS_THETA], *own = parted ? rope->number[MODEL_THETA] : NULL;
    const char *partial = rope->number[MODEL_PARTIAL];
    if (theta && own && strtod(theta, NULL) != strtod(own, NULL)) {
        return json_fail(j->message, j->message_size,
                         "%s: compress_rope_theta %.40s, but rope_theta %.40s in `compress`", j->name, theta, own);
    }
    if (f->rope[older].parts && !parted) {
        return json_fail(j->message, j->message_size, "%s: RoPE's settings have parts, but no `compress`", j->name);
    }
    c->setting[MODEL_ROPE_THETA] = own ? own : theta;
    c->setting[MODEL_EPS] = f->number[MODEL_NORM_EPS];
    if (model__settle_rope(c, rope, j)) return -1;
    return model__settle_rope_dim(c, f->number, partial ? partial : f->number[MODEL_WHOLE_PARTIAL], j);
}

static inline int model_config_parse(model_config *c, const char *path, const void *bytes, size_t size, char *message,
                                     size_t message_size) {
    model__fields fields, text;
    memset(c, 0, sizeof *c);
    memset(&fields, 0, sizeof fields);
    memset(&text, 0, sizeof text);
    if (size > ST_HEADER_SIZE) return json_fail(message, message_size, "%s: too long", path);
    c->text = (char *)malloc(size + 1);
    if (!c->text) return json_fail(message, message_size, "%s: out of memory", path);
    json j = json_open(path, bytes, size, c->text, message, message_size);
    if (model__read_fields(&j, &fields, &text) || json_end(&j)) return -1;
    model__fields *settings = text.given ? &text : &fields;
    model__settle_inference(&settings->inference);
    return model__settle(c, settings, &j);
}

static inline int model_config_open(model_config *c, const char *path, char *message, size_t message_size) {
    size_t size = 0;
    memset(c, 0, sizeof *c);
    void *bytes = st_map(path, &size, message, message_size);
    if (!bytes) return -1;
    const int failed = model_config_parse(c, path, bytes, size, message, message_size);
    st_unmap(bytes, size);
    return failed;
}

static inline const char *model_config_setting(const model_config *c, const char *key) {
    static const char *const keys[MODEL_SETTINGS] = {"rope_theta",     "rope_dim",       "yarn_factor", "yarn_orig_ctx",
                                                     "yarn_beta_fast", "yarn_beta_slow", "eps"};
    const int i = model__index(key, keys, MODEL_SETTINGS);
    return i < MODEL_SETTINGS ? c->setting[i] : NULL;
}

static inline void model_config_close(model_config *c) {
    free(c->text);
    memset(c, 0, sizeof *c);
}

#endif /* MODEL_CONFIG_H */
