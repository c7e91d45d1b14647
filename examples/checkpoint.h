/* checkpoint.h - a model's weights as they are released: one safetensors file, or model.safetensors.index.json and the
 * shards that it names, or the folder with either. A shard is opened when a tensor of it is asked for. */

#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include "dsv4_compressor.h"

#include "paths.h"
#include "safetensors.h"

/* A tensor's name, and where the tensor is. */
typedef struct checkpoint_name {
    const char *name, *file;
    int shard;
} checkpoint_name;

typedef struct checkpoint_shard {
    char *path;
    st_file file;
    int opened;
} checkpoint_shard;

typedef struct checkpoint {
    char *path;             /* of the file, or of the index */
    checkpoint_name *names; /* sorted */
    int count;
    checkpoint_shard *shards;
    int shard_count;
    char *text; /* the index's strings */
} checkpoint;

/* One compressor in it: the place of each parameter, NULL where it has none. */
typedef struct checkpoint_compressor {
    char prefix[ST_NAME_SIZE]; /* without the dot at its end */
    const checkpoint_name *param[DSV4_PARAM_COUNT];
} checkpoint_compressor;

/* 0, or -1 with a line in `message`; checkpoint_close in either case. */
static inline int checkpoint_open(checkpoint *c, const char *path, char *message, size_t message_size);
static inline void checkpoint_close(checkpoint *c);

/* NULL if absent. */
static inline const checkpoint_name *checkpoint_find(const checkpoint *c, const char *name);

/* Opens the shard that holds a tensor. NULL with a line in `message` where that fails. */
static inline st_tensor *checkpoint_tensor(checkpoint *c, const checkpoint_name *name, char *message,
                                           size_t message_size);

/* The parameters under a prefix, which may end in its dot. 0, or -1 with a line in `message` where one parameter stands
 * there twice, or DeepSeek's names beside transformers'. */
static inline int checkpoint_params(const checkpoint *c, const char *prefix, checkpoint_compressor *found,
                                    char *message, size_t message_size);

/* The prefixes alone of all compressors at `prefix` or below, in their numbers' order; to be freed. Their count, or -1
 * where memory lacks. */
static inline int checkpoint_list(const checkpoint *c, const char *prefix, checkpoint_compressor **list);

/* ---- The index --------------------------------------------------------------------------------------------- */

static inline int checkpoint__by_name(const void *a, const void *b) {
    return strcmp(((const checkpoint_name *)a)->name, ((const checkpoint_name *)b)->name);
}

static inline int checkpoint__by_file(const void *a, const void *b) {
    return strcmp(((const checkpoint_name *)a)->file, ((const checkpoint_name *)b)->file);
}

/* Whether a file's name stays in the index's folder. */
static inline int checkpoint__stays(const char *name) {
    const char *part = name;
    if (!*name || *name == '/' || strpbrk(name, "\\:")) return 0;
    for (; part; part = strchr(part, '/') ? strchr(part, '/') + 1 : NULL) {
        if (strncmp(part, "..", 2) == 0 && (part[2] == '/' || !part[2])) return 0;
    }
    return 1;
}

/* "weight_map": {tensor: file, ...} */
static inline int checkpoint__read_map(checkpoint *c, json *j) {
    checkpoint_name entry = {NULL, NULL, 0};
    int more;
    for (int n = 0; (more = json_member(j, &n, &entry.name)) > 0;) {
        void *names = c->names;
        if (json_string(j, &entry.file)) return -1;
        if (!checkpoint__stays(entry.file)) {
            return json_fail(j->message, j->message_size,
                             "%s: tensor '%.80s' would be in '%.80s', outside of its folder", j->name, entry.name,
                             entry.file);
        }
        if (json_grow(j, &names, c->count, sizeof entry)) return -1;
        c->names = (checkpoint_name *)names;
        c->names[c->count++] = entry;
    }
    return more;
}

/* Numbers the files, and sorts the names. */
static inline int checkpoint__number_files(checkpoint *c, json *j) {
    if (c->count == 0) return json_fail(j->message, j->message_size, "%s: no tensors in its weight_map", j->name);
    qsort(c->names, (size_t)c->count, sizeof *c->names, checkpoint__by_file);
    for (int i = 0; i < c->count; i++) {
        c->shard_count += i == 0 || strcmp(c->names[i].file, c->names[i - 1].file) != 0;
        c->names[i].shard = c->shard_count - 1;
    }
    c->shards = (checkpoint_shard *)calloc((size_t)c->shard_count, sizeof *c->shards);
    if (!c->shards) return json_bad(j, "out of memory");
    for (int i = 0; i < c->count; i++) {
        checkpoint_shard *shard = &c->shards[c->names[i].shard];
        if (!shard->path && !(shard->path = path_beside(c->path, c->names[i].file)))
            return json_bad(j, "out of memory");
    }
    qsort(c->names, (size_t)c->count, sizeof *c->names, checkpoint__by_name);
    for (int i = 1; i < c->count; i++) {
        if (strcmp(c->names[i - 1].name, c->names[i].name) == 0) {
            return json_fail(j->message, j->message_size, "%s: tensor '%.80s' stands twice", j->name, c->names[i].name);
        }
    }
    return 0;
}

/* An index in memory; c->path says where its shards lie. */
static inline int checkpoint__parse_index(checkpoint *c, const void *bytes, size_t size, char *message,
                                          size_t message_size) {
    const char *key;
    int more, maps = 0;
    if (size > ST_HEADER_SIZE) return json_fail(message, message_size, "%s: too long for an index", c->path);
    c->text = (char *)malloc(size + 1);
    if (!c->text) return json_fail(message, message_size, "%s: out of memory", c->path);
    json j = json_open(c->path, bytes, size, c->text, message, message_size);
    for (int n = 0; (more = json_member(&j, &n, &key)) > 0;) {
        const int map = strcmp(key, "weight_map") == 0;
        if (map && maps++) return json_bad(&j, "weight_map stands twice");
        if (map ? checkpoint__read_map(c, &j) : json_skip(&j)) return -1;
    }
    return more || json_end(&j) || checkpoint__number_files(c, &j) ? -1 : 0;
}

/* ---- Opening ----------------------------------------------------------------------------------------------- */

static inline int checkpoint__open_index(checkpoint *c, char *message, size_t message_size) {
    size_t size = 0;
    void *bytes = st_map(c->path, &size, message, message_size);
    if (!bytes) return -1;
    const int failed = checkpoint__parse_index(c, bytes, size, message, message_size);
    st_unmap(bytes, size);
    return failed;
}

static inline int checkpoint__open_shard(checkpoint_shard *shard, char *message, size_t message_size) {
    if (!shard->opened && st_open(&shard->file, shard->path, message, message_size)) return -1;
    shard->opened = 1;
    return 0;
}

static inline int checkpoint__open_file(checkpoint *c, char *message, size_t message_size) {
    c->shards = (checkpoint_shard *)calloc(1, sizeof *c->shards);
    if (!c->shards) return json_fail(message, message_size, "out of memory");
    c->shard_count = 1;
    c->shards->path = path_beside(c->path, path_name(c->path));
    if (!c->shards->path) return json_fail(message, message_size, "out of memory");
    if (checkpoint__open_shard(c->shards, message, message_size)) return -1;
    c->names = (checkpoint_name *)calloc((size_t)c->shards->file.count + 1, sizeof *c->names);
    if (!c->names) return json_fail(message, message_size, "out of memory");
    for (c->count = 0; c->count < c->shards->file.count; c->count++) {
        c->names[c->count].name = c->shards->file.tensors[c->count].name;
    }
    return 0;
}

/* The index or the file that a folder holds, or the path itself; to be freed. */
static inline char *checkpoint__resolve(const char *path) {
    static const char *const known[] = {"/model.safetensors.index.json", "/model.safetensors"};
    const size_t size = strlen(path) + sizeof "/model.safetensors.index.json";
    char *name = (char *)malloc(size);
    if (!name) return NULL;
    for (int i = 0; i < 2 && path_is_folder(path); i++) {
        snprintf(name, size, "%s%s", path, known[i]);
        if (path_exists(name)) return name;
    }
    snprintf(name, size, "%s", path);
    return name;
}

static inline int checkpoint_open(checkpoint *c, const char *path, char *message, size_t message_size) {
    memset(c, 0, sizeof *c);
    c->path = checkpoint__resolve(path);
    if (!c->path) return json_fail(message, message_size, "out of memory");
    if (path_is_folder(c->path)) {
        return json_fail(message, message_size,
                         "%s: a folder without model.safetensors.index.json or model.safetensors", path);
    }
    const size_t length = strlen(c->path), ending = strlen(".json");
    const int indexed = length > ending && strcmp(c->path + length - ending, ".json") == 0;
    return indexed ? checkpoint__open_index(c, message, message_size) : checkpoint__open_file(c, message, message_size);
}

static inline void checkpoint_close(checkpoint *c) {
    for (int i = 0; c->shards && i < c->shard_count; i++) {
        if (c->shards[i].opened) st_close(&c->shards[i].file);
        free(c->shards[i].path);
    }
    free(c->shards);
    free(c->names);
    free(c->text);
    free(c->path);
    memset(c, 0, sizeof *c);
}

/* ---- Tensors ----------------------------------------------------------------------------------------------- */

static inline const checkpoint_name *checkpoint_find(const checkpoint *c, const char *name) {
    const checkpoint_name wanted = {name, NULL, 0};
    if (!c->count) return NULL;
    return (const checkpoint_name *)bsearch(&wanted, c->names, (size_t)c->count, sizeof wanted, checkpoint__by_name);
}

static inline st_tensor *checkpoint_tensor(checkpoint *c, const checkpoint_name *name, char *message,
                                           size_t message_size) {
    checkpoint_shard *shard = &c->shards[name->shard];
    if (checkpoint__open_shard(shard, message, message_size)) return NULL;
    st_tensor *t = st_listed(&shard->file, name->name);
    if (!t)
        json_fail(message, message_size, "%s: no tensor '%s', which the index says is there", shard->path, name->name);
    return t;
}

/* ---- Compressors ------------------------------------------------------------------------------------------- */

enum { CHECKPOINT_SPELLINGS = 3, CHECKPOINT_TRANSFORMERS = 2 };

/* Bare, in DeepSeek's checkpoints, in transformers'. */
static const char *const checkpoint_spellings[DSV4_PARAM_COUNT][CHECKPOINT_SPELLINGS] = {
    {"wkv", "wkv.weight", "kv_proj.weight"},
    {"wgate", "wgate.weight", "gate_proj.weight"},
    {"ape", "ape", "position_bias"},
    {"norm", "norm.weight", "kv_norm.weight"},
};

static inline const checkpoint_name *checkpoint__spelt(const checkpoint *c, const char *prefix, const char *joint,
                                                       const char *spelling) {
    char name[2 * ST_NAME_SIZE];
    snprintf(name, sizeof name, "%.*s%s%s", ST_NAME_SIZE, prefix, joint, spelling);
    return checkpoint_find(c, name);
}

/* Takes in the names under a prefix. Where two of them exclude each other, they are put into `clash`. */
static inline void checkpoint__collect(const checkpoint *c, const char *prefix, int spelling,
                                       checkpoint_compressor *found, const checkpoint_name *clash[2]) {
    for (int i = 0; i < 2 * DSV4_PARAM_COUNT; i++) {
        const int param = i / 2;
        const char *text = checkpoint_spellings[param][spelling], *joint = i % 2 ? "." : "";
        const checkpoint_name *name = checkpoint__spelt(c, prefix, joint, text), *before = found->param[param];
        if (!name || name == before) continue;
        if (before) {
            clash[0] = before;
            clash[1] = name;
        }
        found->param[param] = name;
    }
}

/* Any parameter, NULL for none. */
static inline const checkpoint_name *checkpoint__any(const checkpoint_compressor *p) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (p->param[i]) return p->param[i];
    }
    return NULL;
}

/* Without the dot at its end. */
static inline void checkpoint__set_prefix(checkpoint_compressor *p, const char *prefix) {
    size_t length = strlen(prefix);
    if (length && prefix[length - 1] == '.') length--;
    snprintf(p->prefix, sizeof p->prefix, "%.*s", length < sizeof p->prefix ? (int)length : ST_NAME_SIZE - 1, prefix);
}

static inline int checkpoint_params(const checkpoint *c, const char *prefix, checkpoint_compressor *found,
                                    char *message, size_t message_size) {
    checkpoint_compressor others;
    const checkpoint_name *clash[2] = {NULL, NULL};
    memset(found, 0, sizeof *found);
    memset(&others, 0, sizeof others);
    checkpoint__set_prefix(found, prefix);
    for (int i = 0; i < CHECKPOINT_SPELLINGS; i++) {
        checkpoint__collect(c, prefix, i, i == CHECKPOINT_TRANSFORMERS ? &others : found, clash);
    }
    const checkpoint_name *first = checkpoint__any(found), *second = checkpoint__any(&others);
    if (!clash[0] && first && second) {
        clash[0] = first;
        clash[1] = second;
    }
    if (!first) memcpy(found->param, others.param, sizeof found->param);
    if (!clash[0]) return 0;
    return json_fail(message, message_size, "%s: both '%s' and '%s' are there: one prefix is to hold one compressor",
                     c->path, clash[0]->name, clash[1]->name);
}

/* Whether what stands under a prefix is a compressor, and not the attention around it, which has wkv and norm too. */
static inline int checkpoint__is_compressor(const checkpoint_compressor *p) {
    const char *last = strrchr(p->prefix, '.');
    if (!p->param[DSV4_WKV] || !p->param[DSV4_NORM]) return 0;
    return p->param[DSV4_WGATE] || p->param[DSV4_APE] || !*p->prefix ||
           strcmp(last ? last + 1 : p->prefix, "compressor") == 0;
}

static inline int checkpoint__is_below(const char *name, const char *prefix) {
    size_t length = strlen(prefix);
    if (length && prefix[length - 1] == '.') length--;
    return strncmp(name, prefix, length) == 0 && (length == 0 || !name[length] || name[length] == '.');
}

/* By name, numbers in names by their values: layers.9 before layers.10. */
static inline int checkpoint__by_prefix(const void *a, const void *b) {
    static const char digits[] = "0123456789";
    const char *x = ((const checkpoint_compressor *)a)->prefix, *y = ((const checkpoint_compressor *)b)->prefix;
    while (*x && *y) {
        const size_t x_digits = strspn(x, digits), y_digits = strspn(y, digits);
        const size_t length = x_digits && y_digits ? x_digits : 1;
        if (x_digits && y_digits && x_digits != y_digits) return x_digits < y_digits ? -1 : 1;
        if (memcmp(x, y, length) != 0) break;
        x += length;
        y += length;
    }
    return strcmp(x, y);
}

/* Whether `name` is wkv's in that spelling, of a compressor at `prefix` or below; then all that is spelt so with it. */
static inline int checkpoint__from_wkv(const checkpoint *c, const char *name, int spelling, const char *prefix,
                                       checkpoint_compressor *found) {
    const checkpoint_name *clash[2];
    char before[ST_NAME_SIZE];
    const char *wkv = checkpoint_spellings[DSV4_WKV][spelling];
    const size_t whole = strlen(name), ending = strlen(wkv), length = whole - ending;
    if (whole < ending || length >= sizeof before || strcmp(name + length, wkv) != 0) return 0;
    if (length && name[length - 1] != '.') return 0;
    memset(found, 0, sizeof *found);
    snprintf(before, sizeof before, "%.*s", (int)length, name);
    checkpoint__set_prefix(found, before);
    /* An ape has the same name bare and in DeepSeek's checkpoints, whose other names may be mixed. */
    for (int i = 0; i < CHECKPOINT_SPELLINGS; i++) {
        if ((i == CHECKPOINT_TRANSFORMERS) == (spelling == CHECKPOINT_TRANSFORMERS)) {
            checkpoint__collect(c, before, i, found, clash);
        }
    }
    return checkpoint__is_below(found->prefix, prefix) && checkpoint__is_compressor(found);
}

static inline int checkpoint_list(const checkpoint *c, const char *prefix, checkpoint_compressor **list) {
    checkpoint_compressor found;
    int count = 0, capacity = 0, kept = 0;
    *list = NULL;
    for (int i = 0; i < c->count * CHECKPOINT_SPELLINGS; i++) {
        if (!checkpoint__from_wkv(c, c->names[i / CHECKPOINT_SPELLINGS].name, i % CHECKPOINT_SPELLINGS, prefix, &found))
            continue;
        if (count == capacity) {
            capacity = 2 * capacity + 16;
            void *grown = realloc(*list, (size_t)capacity * sizeof found);
            if (!grown) return -1;
            *list = (checkpoint_compressor *)grown;
        }
        (*list)[count++] = found;
    }
    if (count) qsort(*list, (size_t)count, sizeof found, checkpoint__by_prefix);
    for (int i = 0; i < count; i++) { /* each prefix once */
        if (!kept || strcmp((*list)[i].prefix, (*list)[kept - 1].prefix) != 0) (*list)[kept++] = (*list)[i];
    }
    return kept;
}

#endif /* CHECKPOINT_H */
