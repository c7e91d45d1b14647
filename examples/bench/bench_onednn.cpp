// bench_onednn.cpp - oneDNN's matrix product alone, for examples/bench/bench_peers.py:
//     bench_onednn ROWS INNER COLUMNS bf16|f32        prints the median seconds of x [ROWS, INNER] times weights
// The weights are laid out as oneDNN likes them best beforehand, as an engine would do once. The result is fp32.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#include <dnnl.hpp>

using dnnl::memory;

static memory random_matrix(const dnnl::engine &engine, dnnl::stream &stream, memory::dims dims,
                            memory::data_type type) {
    const memory::desc plain(dims, memory::data_type::f32, memory::format_tag::ab);
    memory source(plain, engine), result(memory::desc(dims, type, memory::format_tag::ab), engine);
    float *numbers = static_cast<float *>(source.get_data_handle());
    std::uint32_t seed = 1;
    for (memory::dim i = 0; i < dims[0] * dims[1]; i++) {
        seed = seed * 1664525u + 1013904223u;
        numbers[i] = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
    }
    dnnl::reorder(source, result).execute(stream, source, result);
    stream.wait();
    return result;
}

static double median_seconds(const dnnl::matmul &product, dnnl::stream &stream, memory x, memory weights, memory out) {
    std::vector<double> seconds;
    for (int run = 0; run < 6; run++) {
        const std::clock_t start = std::clock(); // processor time, of one thread
        product.execute(stream, {{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, weights}, {DNNL_ARG_DST, out}});
        stream.wait();
        if (run > 0) // the first one warms up
            seconds.push_back(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[seconds.size() / 2];
}

int main(int count, char **arguments) {
    if (count != 5) {
        std::fprintf(stderr, "usage: bench_onednn ROWS INNER COLUMNS bf16|f32\n");
        return 2;
    }
    const memory::dim rows = std::atoll(arguments[1]), inner = std::atoll(arguments[2]);
    const memory::dim columns = std::atoll(arguments[3]);
    const auto type = std::strcmp(arguments[4], "bf16") == 0 ? memory::data_type::bf16 : memory::data_type::f32;
    try {
        dnnl::engine engine(dnnl::engine::kind::cpu, 0);
        dnnl::stream stream(engine);
        memory x = random_matrix(engine, stream, {rows, inner}, type);
        memory plain = random_matrix(engine, stream, {inner, columns}, type);
        const memory::desc any({inner, columns}, type, memory::format_tag::any);
        const memory::desc result({rows, columns}, memory::data_type::f32, memory::format_tag::ab);
#if DNNL_VERSION_MAJOR >= 3
        const dnnl::matmul::primitive_desc how(engine, x.get_desc(), any, result);
#else
        const dnnl::matmul::primitive_desc how(dnnl::matmul::desc(x.get_desc(), any, result), engine);
#endif
        memory weights(how.weights_desc(), engine), out(result, engine);
        dnnl::reorder(plain, weights).execute(stream, plain, weights);
        stream.wait();
        std::printf("%.6f\n", median_seconds(dnnl::matmul(how), stream, x, weights, out));
    } catch (const dnnl::error &error) {
        std::fprintf(stderr, "bench_onednn: %s\n", error.what());
        return 1;
    }
    return 0;
}
