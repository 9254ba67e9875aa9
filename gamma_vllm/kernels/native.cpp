// Products of activations with weights of 2 to 8 bits, read as the checkpoint stores them. For CPUs with AVX-512 VBMI and
// BF16. Compiled by native.py on first use, against torch's stable interface: torch.ops.gamma.native_layer is called from
// compiled graphs without Python, which would cost as much as the products of a small layer.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "native_few.h"
#include "native_many.h"

namespace {

using torch::stable::Tensor;

constexpr long kFewTokens = 16;  // up to so many are faster code by code (measured, Zen 5, one core)

template <typename Out>
void multiply_few(const Weight& w, const uint16_t* x, long tokens, Out* out, long out_stride) {
    switch (w.bits) {
        case 2: return multiply_few<2>(w, x, tokens, out, out_stride);
        case 3: return multiply_few<3>(w, x, tokens, out, out_stride);
        case 4: return multiply_few<4>(w, x, tokens, out, out_stride);
        case 5: return multiply_few<5>(w, x, tokens, out, out_stride);
        case 6: return multiply_few<6>(w, x, tokens, out, out_stride);
        case 7: return multiply_few<7>(w, x, tokens, out, out_stride);
        case 8: return multiply_few<8>(w, x, tokens, out, out_stride);
    }
}

void multiply_many(const Weight& w, const uint16_t* x, long tokens, uint16_t* out, long out_stride) {
    if (w.bits == 16) {
        const uint16_t* dense = (const uint16_t*)w.packed;
        const auto fill = [&](long row, long begin, long end, uint16_t* to) {
            std::memcpy(to, dense + row * w.columns + begin, (end - begin) * sizeof(uint16_t));
        };
        return multiply_many(w, fill, x, tokens, out, out_stride);
    }
    with_unpacker(w.bits, [&](const auto& unpacker) {
        const auto fill = [&](long row, long begin, long end, uint16_t* to) { unpacker.dequantize(w, row, begin, end, to); };
        multiply_many(w, fill, x, tokens, out, out_stride);
    });
}

bool known(long bits) { return (bits >= 2 && bits <= 8) || bits == 16; }

// See `_fake_layer` in native.py.
Tensor native_layer(Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales, std::vector<Tensor> zeros,
                    int64_t columns, std::vector<int64_t> rows, std::vector<int64_t> group_sizes,
                    std::vector<int64_t> num_bits) {
    const int64_t last = x.dim() - 1;
    STD_TORCH_CHECK(x.is_contiguous() && x.element_size() == 2 && x.size(last) == columns,
                    "gamma::native_layer wants contiguous bfloat16 activations with ", columns, " columns");
    std::vector<Weight> all(weights.size());
    long total = 0, tokens = 1;
    for (size_t i = 0; i < all.size(); i++) {
        STD_TORCH_CHECK(known(num_bits[i]), "gamma::native_layer knows no ", num_bits[i], " bits");
        const bool quantized = num_bits[i] != 16, zero_points = zeros[i].element_size() == 1;
        all[i] = {(const uint8_t*)weights[i].const_data_ptr(),
                  quantized ? (const uint16_t*)scales[i].const_data_ptr() : nullptr,
                  zero_points ? (const uint8_t*)zeros[i].const_data_ptr() : nullptr,
                  quantized && scales[i].scalar_type() == torch::headeronly::ScalarType::BFloat16,
                  rows[i],
                  columns,
                  quantized ? group_sizes[i] : columns,
                  num_bits[i]};
        total += rows[i];
    }
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < last; i++) {
        shape.push_back(x.size(i));
        tokens *= x.size(i);
    }
    shape.push_back(total);
    Tensor output = torch::stable::new_empty(x, shape);
    if (tokens == 0) return output;
    const uint16_t* from = (const uint16_t*)x.const_data_ptr();
    uint16_t* to = (uint16_t*)output.mutable_data_ptr();
#pragma omp parallel
    for (size_t i = 0, start = 0; i < all.size(); start += all[i++].rows) {
        if (tokens <= kFewTokens && all[i].bits != 16) {
            multiply_few(all[i], from, tokens, to + start, total);
        } else {
            multiply_many(all[i], from, tokens, to + start, total);
        }
    }
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gamma, CPU, m) { m.impl("native_layer", TORCH_BOX(&native_layer)); }

// x [tokens, columns] in bfloat16 to out [tokens, rows] in float32, exact but for sums. 2 to 8 bits.
extern "C" void gamma_multiply_few(const Weight* weight, const uint16_t* x, long tokens, float* out, long out_stride) {
#pragma omp parallel
    multiply_few(*weight, x, tokens, out, out_stride);
}

// The whole weight as [rows, columns] in bfloat16 or float32.
extern "C" void gamma_dequantize(const Weight* weight, void* out, int to_bfloat16) {
    const Weight& w = *weight;
    with_unpacker(w.bits, [&](const auto& unpacker) {
#pragma omp parallel for schedule(static)
        for (long row = 0; row < w.rows; row++) {
            if (to_bfloat16) {
                unpacker.dequantize(w, row, 0, w.columns, (uint16_t*)out + row * w.columns);
            } else {
                unpacker.dequantize(w, row, 0, w.columns, (float*)out + row * w.columns);
            }
        }
    });
}
