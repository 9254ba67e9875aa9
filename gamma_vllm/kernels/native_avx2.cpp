// native_avx512.cpp for CPUs with AVX2, FMA and F16C only: the same operators under names of their own, so that both
// libraries can be in a process.

#include "native_avx2_dense.h"
#include "native_avx2_gemm.h"
#include "native_avx2_gemv.h"
#include "native_experts.h"
#include "native_operators.h"

namespace {

constexpr long kGemvTokens = 10;  // up to so many are faster code by code, in gemv (measured, Zen 5, one core)

// Calls work(std::integral_constant<int, bits>()).
template <typename Work>
void with_bits(long bits, const Work& work) {
    switch (bits) {
        case 2: return work(std::integral_constant<int, 2>());
        case 3: return work(std::integral_constant<int, 3>());
        case 4: return work(std::integral_constant<int, 4>());
        case 5: return work(std::integral_constant<int, 5>());
        case 6: return work(std::integral_constant<int, 6>());
        case 8: return work(std::integral_constant<int, 8>());
    }
}

template <typename Out>
void gemv(const Weight& w, const uint16_t* x, long tokens, Out* out, long out_stride) {
    with_bits(w.bits, [&](auto bits) { gemv<bits()>(w, x, tokens, out, out_stride); });
}

// Activations x [tokens, columns] times the segments: to their places in out [tokens, total].
void multiply(const std::vector<Part>& parts, const uint16_t* x, long tokens, uint16_t* out, long total) {
    const long columns = parts[0].weight.columns;
    const bool decodes = tokens <= kGemvTokens;
    thread_local AlignedSpace<int16_t> values;
    thread_local AlignedSpace<float> scales;
    int16_t* const integers = decodes ? nullptr : values.of(tokens * columns);
    float* const factors = decodes ? nullptr : scales.of(tokens * columns / kBlock);
#pragma omp parallel
    {
        long group_size = 0;  // of what the activations are quantized in
        for (const auto& [w, start] : parts) {
            if (w.bits == 16) {
                multiply_dense(w, x, tokens, out + start, total);
            } else if (decodes) {
                gemv(w, x, tokens, out + start, total);
            } else {
                if (w.group_size != group_size) {
                    if (group_size) {
#pragma omp barrier
                    }
                    group_size = w.group_size;
                    quantize(x, tokens, columns, group_size, integers, factors);
                }
                with_bits(w.bits, [&](auto bits) { gemm<bits()>(w, {integers, factors}, tokens, out + start, total); });
            }
        }
    }
}

Tensor native_avx2_layer(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> kinds) {
    return layer_of(x, tensors, kinds, multiply);
}

Tensor native_avx2_experts_up(Tensor x, Tensor ids, std::vector<Tensor> tensors) {
    return experts_up(x, ids, tensors, multiply);
}

Tensor native_avx2_experts_down(Tensor x, Tensor ids, Tensor weights, std::vector<Tensor> tensors, bool silu) {
    return experts_down(x, ids, weights, tensors, silu, multiply);
}

Tensor native_avx2_gather_rows(Tensor ids, Tensor packed, Tensor scale, std::optional<Tensor> zero_point, int64_t bits) {
    std::optional<Tensor> output;
    const bool known = with_codes(bits, [&](const auto& codes) {
        output = gather_rows(ids, packed, scale, zero_point, bits, [&](const Weight& w, uint16_t* to) {
            codes.dequantize(w, 0, to);
        });
    });
    STD_TORCH_CHECK(known, "gamma::native_avx2_gather_rows knows no ", bits, " bits");
    return *output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gamma, CPU, m) {
    m.impl("native_avx2_layer", TORCH_BOX(&native_avx2_layer));
    m.impl("native_avx2_experts_up", TORCH_BOX(&native_avx2_experts_up));
    m.impl("native_avx2_experts_down", TORCH_BOX(&native_avx2_experts_down));
    m.impl("native_avx2_gather_rows", TORCH_BOX(&native_avx2_gather_rows));
}

// x [tokens, columns] in bfloat16 to out [tokens, rows] in float32. 2 to 8 bits.
extern "C" void gamma_gemv(const Weight* weight, const uint16_t* x, long tokens, float* out, long out_stride) {
#pragma omp parallel
    gemv(*weight, x, tokens, out, out_stride);
}

// The whole weight as [rows, columns] in float32.
extern "C" void gamma_dequantize(const Weight* weight, float* out) {
    const Weight& w = *weight;
    with_codes(w.bits, [&](const auto& codes) {
#pragma omp parallel for schedule(static)
        for (long row = 0; row < w.rows; row++) codes.dequantize(w, row, out + row * w.columns);
    });
}
