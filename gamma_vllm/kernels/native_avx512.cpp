// Products of activations with weights of 2 to 8 bits, read as the checkpoint stores them. For CPUs with AVX-512 VBMI and
// BF16. Compiled by native.py on first use, against torch's stable interface: as Python, the operators would cost as much
// as the products of a small layer.

#include "native_amx_gemm_codes.h"
#include "native_avx512_dense.h"
#include "native_avx512_gemm.h"
#include "native_experts.h"
#include "native_operators.h"

namespace {

constexpr long kGemvTokens = 16;  // up to so many are faster code by code, in gemv (measured, Zen 5, one core)
constexpr long kGemvTokensBesideAmx = 2;  // Granite Rapids

bool use_amx = has_amx();

template <typename Out>
void gemv(const Weight& w, const uint16_t* x, long tokens, Out* out, long out_stride) {
    switch (w.bits) {
        case 2: return gemv<2>(w, x, tokens, out, out_stride);
        case 3: return gemv<3>(w, x, tokens, out, out_stride);
        case 4: return gemv<4>(w, x, tokens, out, out_stride);
        case 5: return gemv<5>(w, x, tokens, out, out_stride);
        case 6: return gemv<6>(w, x, tokens, out, out_stride);
        case 8: return gemv<8>(w, x, tokens, out, out_stride);
    }
}

// Calls work(fill), where fill(row, begin, end, to, step) is as gemm and gemm_amx want it.
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

// Several activations x [tokens, columns] times the segments `parts`: to their places in out [tokens, total].
void gemm(const std::vector<Part>& parts, const uint16_t* x, long tokens, uint16_t* out, long total) {
    const long columns = parts[0].weight.columns;
    thread_local AlignedSpace<uint16_t> tiles;
    thread_local AlignedSpace<float> floats;
    uint16_t* const slab = use_amx ? tiles.of((std::min(tokens, kSlabTokens) + 15) / 16 * 16 * columns) : nullptr;
    const bool codes_in_tiles = use_amx && tokens <= kGemmCodesTokens;
    float* const sums = codes_in_tiles ? floats.of(2 * kGemmCodesTokens * columns / kBlock) : nullptr;
    const auto by_codes = [codes_in_tiles](const Weight& w) { return codes_in_tiles && w.bits < 8; };
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
                        with_fill(w, [&](const auto& fill) { gemm_amx(w, fill, slab, count, to, total, space); });
                    }
#pragma omp barrier
                }
                for (const auto& [w, start] : parts) {
                    if (by_codes(w)) gemm_amx_codes(w, x, tokens, slab, sums, out + start, total, space);
                }
            }
            release_tiles();
        } else {
            for (const auto& [w, start] : parts) {
                with_fill(w, [&](const auto& fill) { gemm(w, fill, x, tokens, out + start, total); });
            }
        }
    }
}

// Activations x [tokens, columns] times the segments: to their places in out [tokens, total].
void multiply(const std::vector<Part>& all, const uint16_t* x, long tokens, uint16_t* out, long total) {
    const long most = use_amx ? kGemvTokensBesideAmx : kGemvTokens;
    if (tokens > most) return gemm(all, x, tokens, out, total);
#pragma omp parallel
    for (const auto& [weight, start] : all) {
        if (weight.bits == 16) {
            multiply_dense(weight, x, tokens, out + start, total);
        } else {
            gemv(weight, x, tokens, out + start, total);
        }
    }
}

Tensor native_layer(Tensor x, std::vector<Tensor> tensors, std::vector<int64_t> kinds) {
    return layer_of(x, tensors, kinds, multiply);
}

Tensor native_experts_up(Tensor x, Tensor ids, std::vector<Tensor> tensors) {
    return experts_up(x, ids, tensors, multiply);
}

Tensor native_experts_down(Tensor x, Tensor ids, Tensor weights, std::vector<Tensor> tensors, bool silu) {
    return experts_down(x, ids, weights, tensors, silu, multiply);
}

Tensor native_gather_rows(Tensor ids, Tensor packed, Tensor scale, std::optional<Tensor> zero_point, int64_t bits) {
    std::optional<Tensor> output;
    const bool known = with_unpacker(bits, [&](const auto& unpacker) {
        output = gather_rows(ids, packed, scale, zero_point, bits, [&](const Weight& w, uint16_t* to) {
            unpacker.dequantize(w, 0, 0, w.columns, to);
        });
    });
    STD_TORCH_CHECK(known, "gamma::native_gather_rows knows no ", bits, " bits");
    return *output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gamma, CPU, m) {
    m.impl("native_layer", TORCH_BOX(&native_layer));
    m.impl("native_experts_up", TORCH_BOX(&native_experts_up));
    m.impl("native_experts_down", TORCH_BOX(&native_experts_down));
    m.impl("native_gather_rows", TORCH_BOX(&native_gather_rows));
}

// Whether AMX is used from now on: if it is wanted and there.
extern "C" bool gamma_use_amx(bool wanted) { return use_amx = wanted && has_amx(); }

// x [tokens, columns] in bfloat16 to out [tokens, rows] in float32, exact but for sums. 2 to 8 bits.
extern "C" void gamma_gemv(const Weight* weight, const uint16_t* x, long tokens, float* out, long out_stride) {
#pragma omp parallel
    gemv(*weight, x, tokens, out, out_stride);
}

// The whole weight as [rows, columns] in float32.
extern "C" void gamma_dequantize(const Weight* weight, float* out) {
    const Weight& w = *weight;
    with_unpacker(w.bits, [&](const auto& unpacker) {
#pragma omp parallel for schedule(static)
        for (long row = 0; row < w.rows; row++) unpacker.dequantize(w, row, 0, w.columns, out + row * w.columns);
    });
}
