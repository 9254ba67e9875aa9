// Products of activations with weights of 2 to 8 bits, read as the checkpoint stores them. For CPUs with AVX-512 VBMI and
// BF16. Compiled by native.py on first use, against torch's stable interface: as Python, the operators would cost as much
// as the products of a small layer.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "native_amx_codes.h"
#include "native_many.h"

namespace {

using torch::stable::Tensor;

constexpr long kFewTokens = 16;  // up to so many are faster code by code (measured, Zen 5, one core)
constexpr long kFewTokensBesideAmx = 2;  // Granite Rapids

bool use_amx = has_amx();

template <typename Out>
void multiply_few(const Weight& w, const uint16_t* x, long tokens, Out* out, long out_stride) {
    switch (w.bits) {
        case 2: return multiply_few<2>(w, x, tokens, out, out_stride);
        case 3: return multiply_few<3>(w, x, tokens, out, out_stride);
        case 4: return multiply_few<4>(w, x, tokens, out, out_stride);
        case 5: return multiply_few<5>(w, x, tokens, out, out_stride);
        case 6: return multiply_few<6>(w, x, tokens, out, out_stride);
        case 8: return multiply_few<8>(w, x, tokens, out, out_stride);
    }
}

// Calls work(fill), where fill(row, begin, end, to, step) is as multiply_many and multiply_amx want it.
template <typename Work>
void with_fill(const Weight& w, const Work& work) {
    if (w.bits == 16) {
        const uint16_t* dense = (const uint16_t*)w.packed;
        return work([&w, dense](long row, long begin, long end, uint16_t* to, long step) {
            for (long k = begin; k < end; k += kBlock, to += step) {
                _mm512_storeu_si512(to, _mm512_loadu_si512(dense + row * w.columns + k));
            }
        });
    }
    with_unpacker(w.bits, [&](const auto& unpacker) {
        work([&](long row, long begin, long end, uint16_t* to, long step) {
            unpacker.dequantize(w, row, begin, end, to, step);
        });
    });
}

// A segment of a layer, and where its rows begin among those of the layer.
struct Part {
    Weight weight;
    long start;
};

// Several activations x [tokens, columns] times the segments `parts`: to their places in out [tokens, total].
void multiply_many(const std::vector<Part>& parts, const uint16_t* x, long tokens, uint16_t* out, long total) {
    const long columns = parts[0].weight.columns;
    thread_local AlignedSpace<uint16_t> tiles;
    thread_local AlignedSpace<float> floats;
    uint16_t* const slab = use_amx ? tiles.of((std::min(tokens, kSlabTokens) + 15) / 16 * 16 * columns) : nullptr;
    const bool some = use_amx && tokens <= kSomeTokens;
    float* const sums = some ? floats.of(2 * kSomeTokens * columns / kBlock) : nullptr;
    const auto by_codes = [some](const Weight& w) { return some && w.bits < 8; };
    const bool dequantizes = !std::all_of(parts.begin(), parts.end(), [&](const Part& p) { return by_codes(p.weight); });
#pragma omp parallel
    {
        thread_local AmxSpace space;
        if (use_amx) {
            configure_tiles();
            for (long first = 0; first < tokens; first += kSlabTokens) {
                const long count = std::min(tokens - first, kSlabTokens);
                if (dequantizes) {
                    tile_activations(x + first * columns, count, columns, slab);
                    for (const auto& [w, start] : parts) {
                        if (by_codes(w)) continue;
                        uint16_t* const to = out + first * total + start;
                        with_fill(w, [&](const auto& fill) { multiply_amx(w, fill, slab, count, to, total, space); });
                    }
#pragma omp barrier
                }
                for (const auto& [w, start] : parts) {
                    if (by_codes(w)) multiply_some(w, x, tokens, slab, sums, out + start, total, space);
                }
            }
            release_tiles();
        } else {
            for (const auto& [w, start] : parts) {
                with_fill(w, [&](const auto& fill) { multiply_many(w, fill, x, tokens, out + start, total); });
            }
        }
    }
}

// The segments of a layer, of which each is rows, group_size, num_bits, symmetric in `kinds` and has `weight` at 16 bits,
// packed, scale and, if asymmetric, zeros in `tensors`.
std::vector<Part> read_segments(const std::vector<Tensor>& tensors, const std::vector<int64_t>& kinds, long columns) {
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
        if (!kinds[4 * i + 3]) w.zeros = (const uint8_t*)take().const_data_ptr();
    }
    return all;
}

// A new tensor [..., columns] in bfloat16 with the leading sizes of `like`. By way of the dispatcher it takes 1 us longer.
Tensor new_rows(const Tensor& like, int64_t leading, int64_t columns) {
    std::vector<int64_t> shape, strides(leading + 1, 1);
    for (int64_t i = 0; i < leading; i++) shape.push_back(like.size(i));
    shape.push_back(columns);
    for (int64_t i = leading; i > 0; i--) strides[i - 1] = strides[i] * shape[i];
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(leading + 1, shape.data(), strides.data(),
                                                           aoti_torch_dtype_bfloat16(), aoti_torch_device_type_cpu(), 0,
                                                           &made));
    return Tensor(made);
}

// See `_fake_layer` in native.py.
Tensor native_layer(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> kinds) {
    const int64_t leading = x.dim() - 1;
    STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::BFloat16,
                    "gamma::native_layer wants contiguous bfloat16 activations");
    const std::vector<Part> all = read_segments(tensors, kinds, x.size(leading));
    const long total = all.back().start + all.back().weight.rows;
    long tokens = 1;
    for (int64_t i = 0; i < leading; i++) tokens *= x.size(i);
    Tensor output = new_rows(x, leading, total);
    if (tokens == 0) return output;
    const uint16_t* from = (const uint16_t*)x.const_data_ptr();
    uint16_t* to = (uint16_t*)output.mutable_data_ptr();
    const long most = use_amx ? kFewTokensBesideAmx : kFewTokens;
    std::vector<Part> few, many;
    for (const Part& part : all) (tokens <= most && part.weight.bits != 16 ? few : many).push_back(part);
    if (!many.empty()) multiply_many(many, from, tokens, to, total);
    if (!few.empty()) {
#pragma omp parallel
        for (const auto& [weight, start] : few) multiply_few(weight, from, tokens, to + start, total);
    }
    return output;
}

// Zero point of a row in words packed along the rows, [words, groups]; a code may lie across two words.
uint8_t zero_point_at(const uint32_t* words, long row, long group, long groups, long bits) {
    const long at = row * bits, word = at / 32, shift = at % 32;
    uint64_t both = words[word * groups + group];
    if (shift + bits > 32) both |= uint64_t(words[(word + 1) * groups + group]) << 32;
    return uint8_t(both >> shift & ((1 << bits) - 1));
}

// See `gather_rows` in embedding.py; to bfloat16.
Tensor native_gather_rows(Tensor ids, Tensor packed, Tensor scale, std::optional<Tensor> zero_point, int64_t bits) {
    const long rows = packed.size(0), groups = scale.size(1), columns = packed.size(1) * 32 / bits, count = ids.numel();
    STD_TORCH_CHECK(ids.is_contiguous() && ids.element_size() == 8, "gamma::native_gather_rows wants contiguous int64 ids");
    STD_TORCH_CHECK(is_packed_width(bits), "gamma::native_gather_rows knows no ", bits, " bits");
    const int64_t* wanted = (const int64_t*)ids.const_data_ptr();
    for (long i = 0; i < count; i++) {
        STD_TORCH_CHECK(wanted[i] >= 0 && wanted[i] < rows, "row ", wanted[i], " of an embedding of ", rows, " rows");
    }
    Tensor output = new_rows(ids, ids.dim(), columns);
    const uint32_t* words = zero_point ? (const uint32_t*)zero_point->const_data_ptr() : nullptr;
    const Weight all = {(const uint8_t*)packed.const_data_ptr(), (const uint16_t*)scale.const_data_ptr(), nullptr,
                        scale.scalar_type() == torch::headeronly::ScalarType::BFloat16, 1, columns, columns / groups, bits};
    uint16_t* to = (uint16_t*)output.mutable_data_ptr();
    with_unpacker(bits, [&](const auto& unpacker) {
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
            w.zeros = words ? zeros.data() : nullptr;
            unpacker.dequantize(w, 0, 0, columns, to + i * columns);
        }
    });
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gamma, CPU, m) {
    m.impl("native_layer", TORCH_BOX(&native_layer));
    m.impl("native_gather_rows", TORCH_BOX(&native_gather_rows));
}

// Whether AMX is used from now on: if it is wanted and there.
extern "C" bool gamma_use_amx(bool wanted) { return use_amx = wanted && has_amx(); }

// x [tokens, columns] in bfloat16 to out [tokens, rows] in float32, exact but for sums. 2 to 8 bits.
extern "C" void gamma_multiply_few(const Weight* weight, const uint16_t* x, long tokens, float* out, long out_stride) {
#pragma omp parallel
    multiply_few(*weight, x, tokens, out, out_stride);
}

// The whole weight as [rows, columns] in float32.
extern "C" void gamma_dequantize(const Weight* weight, float* out) {
    const Weight& w = *weight;
    with_unpacker(w.bits, [&](const auto& unpacker) {
#pragma omp parallel for schedule(static)
        for (long row = 0; row < w.rows; row++) unpacker.dequantize(w, row, 0, w.columns, out + row * w.columns);
    });
}
