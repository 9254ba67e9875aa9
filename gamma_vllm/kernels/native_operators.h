// What operators of torch give and take, for all instruction sets. Against torch's stable interface: as Python, the operators
// would cost as much as the products of a small layer.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "native_layout.h"

namespace {

using torch::stable::Tensor;

// A segment of a layer, and where its rows begin among those of the layer.
struct Part {
    Weight weight;
    long start;
};

// The segments of a layer, of which each is rows, group_size, num_bits, symmetric in `kinds` and has `weight` at 16 bits,
// packed, scale and, if asymmetric, zero_point in `tensors`.
inline std::vector<Part> read_segments(const std::vector<Tensor>& tensors, const std::vector<int64_t>& kinds, long columns) {
    STD_TORCH_CHECK(columns % kBlock == 0, "gamma::native_layer got ", columns, " columns, no multiple of ", kBlock);
    std::vector<Part> all(kinds.size() / 4);
    size_t next = 0;
    long start = 0;
    const auto take = [&]() -> const Tensor& {
        STD_TORCH_CHECK(next < tensors.size(), "gamma::native_layer got ", tensors.size(), " tensors, too few");
        return tensors[next++];
    };
    for (size_t i = 0; i < all.size(); i++) {
        const long rows = kinds[4 * i], group_size = kinds[4 * i + 1], bits = kinds[4 * i + 2];
        STD_TORCH_CHECK(is_packed_width(bits) || bits == 16, "gamma::native_layer knows no ", bits, " bits");
        auto& [w, first] = all[i];
        w = {(const uint8_t*)take().const_data_ptr(), nullptr, nullptr, 0, rows, columns, columns, bits};
        first = start;
        start += rows;
        if (bits == 16) continue;
        const Tensor& scale = take();
        w.scale = (const uint16_t*)scale.const_data_ptr();
        w.scale_is_bf16 = scale.scalar_type() == torch::headeronly::ScalarType::BFloat16;
        w.group_size = group_size;
        if (!kinds[4 * i + 3]) w.zero_point = (const uint8_t*)take().const_data_ptr();
    }
    return all;
}

// A new tensor in bfloat16. By way of the dispatcher it takes 1 us longer.
inline Tensor new_tensor(const std::vector<int64_t>& shape) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (size_t i = shape.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(),
                                                           aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0,
                                                           &made));
    return Tensor(made);
}

// One of shape [..., columns], with the leading sizes of `like`.
inline Tensor new_rows(const Tensor& like, int64_t leading, int64_t columns) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i < leading; i++) shape.push_back(like.size(i));
    shape.push_back(columns);
    return new_tensor(shape);
}

// Zero point of a row in words packed along the rows, [words, groups]; a code may lie across two words.
inline uint8_t zero_point_at(const uint32_t* words, long row, long group, long groups, long bits) {
    const long at = row * bits, word = at / 32, shift = at % 32;
    uint64_t both = words[word * groups + group];
    if (shift + bits > 32) both |= uint64_t(words[(word + 1) * groups + group]) << 32;
    return uint8_t(both >> shift & ((1 << bits) - 1));
}

// The operator of a layer, see `_fake_layer` in native.py. multiply(parts, x, tokens, out, total) gets
// x [tokens, columns] and writes out [tokens, total], both in bfloat16.
template <typename Multiply>
Tensor layer_of(const Tensor& x, const std::vector<Tensor>& tensors, const std::vector<int64_t>& kinds,
                const Multiply& multiply) {
    const int64_t leading = x.dim() - 1;
    STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::BFloat16,
                    "gamma::native_layer wants contiguous bfloat16 activations");
    const std::vector<Part> all = read_segments(tensors, kinds, x.size(leading));
    const long total = all.back().start + all.back().weight.rows;
    long tokens = 1;
    for (int64_t i = 0; i < leading; i++) tokens *= x.size(i);
    Tensor output = new_rows(x, leading, total);
    if (tokens == 0) return output;
    multiply(all, (const uint16_t*)x.const_data_ptr(), tokens, (uint16_t*)output.mutable_data_ptr(), total);
    return output;
}

// The operator of an embedding, see `gather_rows` in embedding.py; to bfloat16. dequantize(w, to) writes a weight of one row.
template <typename Dequantize>
Tensor gather_rows(const Tensor& ids, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& zero_point,
                   int64_t bits, const Dequantize& dequantize) {
    const long rows = packed.size(0), groups = scale.size(1), columns = packed.size(1) * 32 / bits, count = ids.numel();
    STD_TORCH_CHECK(ids.is_contiguous() && ids.element_size() == 8, "gamma::native_gather_rows wants contiguous int64 ids");
    const int64_t* wanted = (const int64_t*)ids.const_data_ptr();
    for (long i = 0; i < count; i++) {
        STD_TORCH_CHECK(wanted[i] >= 0 && wanted[i] < rows, "row ", wanted[i], " of an embedding of ", rows, " rows");
    }
    Tensor output = new_rows(ids, ids.dim(), columns);
    const uint32_t* words = zero_point ? (const uint32_t*)zero_point->const_data_ptr() : nullptr;
    const Weight all = {(const uint8_t*)packed.const_data_ptr(), (const uint16_t*)scale.const_data_ptr(), nullptr,
                        scale.scalar_type() == torch::headeronly::ScalarType::BFloat16, 1, columns, columns / groups, bits};
    uint16_t* to = (uint16_t*)output.mutable_data_ptr();
#pragma omp parallel for schedule(static) if (count > 1)
    for (long i = 0; i < count; i++) {
        const long row = wanted[i];
        std::vector<uint8_t> zeros(words ? groups : 0);
        for (size_t group = 0; group < zeros.size(); group++) {
            zeros[group] = zero_point_at(words, row, group, groups, bits);
        }
        Weight w = all;
        w.packed += row * columns * bits / 8;
        w.scale += row * groups;
        w.zero_point = words ? zeros.data() : nullptr;
        dequantize(w, to + i * columns);
    }
    return output;
}

}  // namespace
