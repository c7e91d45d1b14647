/* init.c - parameters from a seed, as dsv4_param_init gives them: init FILE SEED HIDDEN_DIM HEAD_DIM RATIO OVERLAP */

#define _POSIX_C_SOURCE 200809L
#include "dsv4_compressor.h"
#include "safetensors.h"

int main(int argc, char **argv) {
    dsv4_config config = {0};
    dsv4_param_info info[DSV4_PARAM_COUNT];
    st_tensor tensors[DSV4_PARAM_COUNT];
    char message[1024] = "usage: init FILE SEED HIDDEN_DIM HEAD_DIM RATIO OVERLAP";
    int status = argc == 7 ? 0 : 1;
    if (!status) {
        config.hidden_dim = strtoll(argv[3], NULL, 10);
        config.head_dim = strtoll(argv[4], NULL, 10);
        config.ratio = strtoll(argv[5], NULL, 10);
        config.overlap = argv[6][0] == '1';
        status = dsv4_config_params(&config, info, NULL) != DSV4_OK;
    }
    for (int i = 0; i < DSV4_PARAM_COUNT && !status; i++) {
        const int64_t shape[2] = {info[i].rows, info[i].columns};
        float *data = malloc((size_t)info[i].count * sizeof *data);
        const dsv4_matrix array = {data, DSV4_F32, 0};
        status = !data || dsv4_param_init(&config, (dsv4_param)i, strtoull(argv[2], NULL, 10), array, NULL);
        tensors[i] = st_make(info[i].name, ST_F32, data, i == DSV4_NORM ? 1 : 2, i == DSV4_NORM ? shape + 1 : shape);
    }
    if (!status) status = st_write(argv[1], tensors, DSV4_PARAM_COUNT, NULL, 0, message, sizeof message);
    if (status) fprintf(stderr, "init: %s\n", message);
    return status != 0;
}
