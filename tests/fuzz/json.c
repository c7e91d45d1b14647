/* JSON, a checkpoint's index and a model's config.json from arbitrary bytes: what is accepted is what it claims to
 * be, and what is refused leaves one line. The first byte says as which of them the rest is read. */

#define _POSIX_C_SOURCE 200809L
#include "fuzz.h"

#include "checkpoint.h"
#include "model_config.h"

/* Whether strtod takes all of it, and it has no characters but those of JSON's numbers. */
static int is_number(const char *text) {
    char *end;
    strtod(text, &end);
    return *text && !*end && strspn(text, "+-.0123456789eE") == strlen(text);
}

static void check_skip(const uint8_t *data, size_t size, char *message, size_t message_size) {
    char *room = (char *)malloc(size + 1);
    REQUIRE(room);
    json j = json_open("text", data, size, room, message, message_size);
    const int failed = json_skip(&j) || json_end(&j);
    REQUIRE(failed || j.at == j.end);
    REQUIRE(failed || j.room == room);
    free(room);

    room = (char *)malloc(size + 1);
    REQUIRE(room);
    json k = json_open("text", data, size, room, NULL, 0);
    const char *number = NULL;
    if (json_number(&k, &number) == 0) REQUIRE(is_number(number));
    free(room);
    if (!failed) *message = 0;
}

static void check_index(const uint8_t *data, size_t size, char *message, size_t message_size) {
    checkpoint c;
    checkpoint_compressor *list = NULL;
    memset(&c, 0, sizeof c);
    c.path = (char *)calloc(1, 32);
    REQUIRE(c.path);
    strcpy(c.path, "folder/index");
    if (checkpoint__parse_index(&c, data, size, message, message_size) == 0) {
        *message = 0;
        REQUIRE(c.count > 0 && c.shard_count > 0 && c.shard_count <= c.count);
        for (int i = 0; i < c.count; i++) {
            REQUIRE(i == 0 || strcmp(c.names[i - 1].name, c.names[i].name) < 0);
            REQUIRE(checkpoint_find(&c, c.names[i].name) == &c.names[i]);
            REQUIRE(c.names[i].shard >= 0 && c.names[i].shard < c.shard_count);
            const char *path = c.shards[c.names[i].shard].path;
            REQUIRE(strncmp(path, "folder/", 7) == 0 && strcmp(path + 7, c.names[i].file) == 0);
            REQUIRE(path[7] != '/' && !strstr(path, "/../") && strcmp(path + 7, "..") != 0);
        }
        const int count = checkpoint_list(&c, "", &list);
        REQUIRE(count >= 0);
        for (int i = 1; i < count; i++) REQUIRE(strcmp(list[i - 1].prefix, list[i].prefix) != 0);
    }
    free(list);
    checkpoint_close(&c);
}

static void check_config(const uint8_t *data, size_t size, char *message, size_t message_size) {
    static const char *const keys[] = {"rope_theta",     "rope_dim",       "yarn_factor", "yarn_orig_ctx",
                                       "yarn_beta_fast", "yarn_beta_slow", "eps"};
    model_config c;
    if (model_config_parse(&c, "config.json", data, size, message, message_size) == 0) {
        *message = 0;
        REQUIRE(model_config_setting(&c, "yarn_factor") && !model_config_setting(&c, "ratio"));
        for (int i = 0; i < 7; i++) {
            const char *text = model_config_setting(&c, keys[i]);
            REQUIRE(!text || is_number(text));
        }
    }
    model_config_close(&c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char message[300] = "a line";
    if (size == 0) return 0;
    (data[0] == 'i'   ? check_index
     : data[0] == 'c' ? check_config
                      : check_skip)(data + 1, size - 1, message, sizeof message);
    REQUIRE(!strchr(message, '\n') && strcmp(message, "a line") != 0);
    return 0;
}
