/* compress_report.h - what compress.c says of its work, and of the compressors that a checkpoint holds: text or JSON. A
 * part of that file, to be included where its types are known. */

#ifndef COMPRESS_REPORT_H
#define COMPRESS_REPORT_H

/* ---- What is said ------------------------------------------------------------------------------------------ */

static void print_json_string(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') putchar('\\');
        if ((unsigned char)*text < 0x20) {
            printf("\\u%04x", (unsigned)(unsigned char)*text);
        } else {
            putchar(*text);
        }
    }
    putchar('"');
}

/* "ratio": {"value": 4, "from": "ape"}, ...; infinite values as text. */
static void print_json_settings(const job *j) {
    char text[40];
    for (int i = 0; i < ALL_TOLD; i++) {
        const char *value = told_text(j, i, text, sizeof text), *quote = i >= TOLD || strchr(value, 'i') ? "\"" : "";
        printf("%s\"%s\": {\"value\": %s%s%s, \"from\": \"%s\"}", i ? ", " : "", told_key(i), quote, value, quote,
               origins[told_from(j, i)]);
    }
}

/* A line for each place that settings came from. */
static void settings_lines(const job *j, char *lines, size_t size) {
    size_t used = 0;
    for (int from = ORIGINS - 1; from >= 0; from--) {
        int said = 0;
        for (int i = 0; i < ALL_TOLD; i++) {
            char text[40];
            if ((int)told_from(j, i) != from) continue;
            if (!said++) used += (size_t)snprintf(lines + used, size - used, "settings, %s: ", origins[from]);
            used += (size_t)snprintf(lines + used, size - used, "%s%s %s", said > 1 ? ", " : "", told_key(i),
                                     told_text(j, i, text, sizeof text));
        }
        if (said) used += (size_t)snprintf(lines + used, size - used, "\n");
    }
}

/* Bytes of a tensor in a file. */
static double file_bytes(const st_tensor *t) { return (double)t->count * st__bits(t->type) / 8; }

/* The first results: out, or rows and scales. */
static double entry_bytes(const job *j) {
    return file_bytes(&j->results[0]) + (j->o.packed ? file_bytes(&j->results[1]) : 0);
}

static void report_json(const job *j) {
    const double tokens = (double)j->rows * (double)j->tokens;
    printf("{");
    if (j->o.all) {
        printf("\"prefix\": ");
        print_json_string(j->at.prefix);
        printf(", ");
    }
    printf("\"batch\": %" PRId64 ", \"tokens\": %.0f, \"entries\": %" PRId64 ", \"bytes_before\": %.0f, "
           "\"bytes_after\": %.0f, \"hidden_dim\": %" PRId64 ", \"head_dim\": %" PRId64 ", \"ratio\": %" PRId64
           ", \"overlap\": %s, \"preset\": \"%s\", \"dtype\": \"%s\", \"pack_seconds\": %.6f, \"seconds\": %.6f, "
           "\"tokens_per_s\": %.1f, \"isa\": \"%s\", \"threads\": %d, \"settings\": {",
           j->rows, tokens, j->rows * j->entries, file_bytes(j->x), entry_bytes(j), j->config.hidden_dim,
           j->config.head_dim, j->config.ratio, j->config.overlap ? "true" : "false", j->preset,
           j->x->dtype == ST_BF16 ? "BF16" : "F32", j->pack_seconds, j->seconds,
           j->seconds > 0 ? tokens / j->seconds : 0, j->isa, j->run->threads->workers + 1);
    print_json_settings(j);
    printf("}}\n");
}

static void report_text(const job *j) {
    const double before = file_bytes(j->x), after = entry_bytes(j), tokens = (double)j->rows * (double)j->tokens;
    const int threads = j->run->threads->workers + 1;
    if (j->o.all) printf("%s:\n", *j->at.prefix ? j->at.prefix : "no prefix");
    printf("%" PRId64 " x %" PRId64 " tokens -> %" PRId64 " x %" PRId64 " entries of %" PRId64 " numbers%s\n", j->rows,
           j->tokens, j->rows, j->entries, j->config.head_dim, j->x->dtype == ST_BF16 ? " in bf16" : "");
    printf("%.0f bytes of hidden states -> %.0f bytes of entries", before, after);
    printf(after > 0 ? ", %.0f times fewer\n" : "\n", before / after);
    printf("ratio %" PRId64 "%s, rounding as in preset %s, sums of %s\n", j->config.ratio,
           j->config.overlap ? ", overlapping windows" : "", j->preset, sums_names[j->config.sums]);
    printf("%.3f s (%.0f tokens/s), and %.3f s to pack the weights; kernels %s, %d thread%s\n", j->seconds,
           j->seconds > 0 ? tokens / j->seconds : 0, j->pack_seconds, j->isa, threads, threads > 1 ? "s" : "");
}

static void report(const run *r) {
    char lines[2048];
    for (int i = 0; i < r->job_count; i++) {
        if (r->o.json) {
            report_json(&r->jobs[i]);
            continue;
        }
        report_text(&r->jobs[i]);
        settings_lines(&r->jobs[i], lines, sizeof lines);
        fputs(lines, stdout);
    }
    if (r->o.json) return;
    printf("entries: %s\n", r->o.output);
    if (r->o.plot) printf("picture: %s\n", r->o.plot);
}

/* ---- --list ------------------------------------------------------------------------------------------------ */

/* The published model's compressor of these sizes, NULL for none; a ratio that nothing tells fits any. */
static const char *matching_preset(const dsv4_config *c) {
    for (int i = 0; i < DSV4_PRESET_COUNT; i++) {
        const dsv4_config p = dsv4_preset_config((dsv4_preset)i);
        if ((c->ratio == p.ratio || !c->ratio) && c->overlap == p.overlap && c->head_dim == p.head_dim &&
            c->hidden_dim == p.hidden_dim && c->no_ape == p.no_ape && c->no_gate == p.no_gate) {
            return dsv4_preset_name((dsv4_preset)i);
        }
    }
    return NULL;
}

static const char *const param_names[DSV4_PARAM_COUNT] = {"wkv", "wgate", "ape", "norm"};

static void list_json(const job *j) {
    const char *preset = matching_preset(&j->config), *comma = "";
    printf("{\"prefix\": ");
    print_json_string(j->at.prefix);
    printf(j->config.ratio ? ", \"ratio\": %" PRId64 : ", \"ratio\": null", j->config.ratio);
    printf(", \"overlap\": %s, \"head_dim\": %" PRId64 ", \"hidden_dim\": %" PRId64 ", \"dtypes\": {",
           j->config.overlap ? "true" : "false", j->config.head_dim, j->config.hidden_dim);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (!j->param[i]) continue;
        printf("%s\"%s\": ", comma, param_names[i]);
        print_json_string(j->param[i]->type);
        comma = ", ";
    }
    printf("}, \"preset\": %s%s%s}\n", preset ? "\"" : "", preset ? preset : "null", preset ? "\"" : "");
}

static void list_text(const job *j) {
    const char *preset = matching_preset(&j->config);
    printf("%s: ratio ", *j->at.prefix ? j->at.prefix : "no prefix");
    printf(j->config.ratio ? "%" PRId64 : "not told", j->config.ratio);
    printf(", overlap %d, head_dim %" PRId64 ", hidden_dim %" PRId64, j->config.overlap, j->config.head_dim,
           j->config.hidden_dim);
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (j->param[i]) printf(", %s %s", param_names[i], j->param[i]->type);
    }
    printf("; %s%s\n", preset ? "preset " : "no preset", preset ? preset : "");
}

/* The shard of a parameter that is not on this disk, NULL where all are. */
static const char *absent_shard(const job *j) {
    for (int i = 0; i < DSV4_PARAM_COUNT; i++) {
        if (j->at.param[i] && !path_exists(shard_of(j, i)->path)) return shard_of(j, i)->path;
    }
    return NULL;
}

static void list_absent(const job *j, const char *path) {
    if (!j->o.json) {
        printf("%s: in %s, which is not there\n", j->at.prefix, path);
        return;
    }
    printf("{\"prefix\": ");
    print_json_string(j->at.prefix);
    printf(", \"absent\": ");
    print_json_string(path);
    printf("}\n");
}

static int list_compressors(const run *r) {
    for (int i = 0; i < r->job_count; i++) {
        job *j = &r->jobs[i];
        const char *absent = absent_shard(j);
        if (!absent && describe(j)) return TROUBLE;
        if (j->config.no_gate && !j->config.overlap && !j->config.ratio) j->config.ratio = 1; /* it has no other */
        if (absent) {
            list_absent(j, absent);
        } else if (r->o.json) {
            list_json(j);
        } else {
            list_text(j);
        }
    }
    return 0;
}

#endif /* COMPRESS_REPORT_H */
