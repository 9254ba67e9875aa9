// Products of a layer of experts, each of its own widths: all that got tokens in one parallel region for each of the
// two weights. Threads share out (expert, rows), and take the next when they are done; what one of them multiplies it
// multiplies alone, with the functions of ordinary layers.

#pragma once

#include "native_operators.h"

namespace {

// (token, choice) pairs, those of one expert next to each other in the order of tokens. Pairs of other ranks' experts,
// whose id is -1, are left out.
struct Routed {
    long tokens, choices;
    std::vector<long> pairs;  // token * choices + choice
    std::vector<long> first;  // [experts + 1]: where an expert's pairs begin

    Routed(const Tensor& ids, long experts) : tokens(ids.size(0)), choices(ids.size(1)), first(experts + 1) {
        STD_TORCH_CHECK(ids.is_contiguous() && (ids.element_size() == 8 || ids.element_size() == 4),
                        "gamma::native_experts wants contiguous ids in int32 or int64");
        ids.element_size() == 8 ? sort((const int64_t*)ids.const_data_ptr()) : sort((const int32_t*)ids.const_data_ptr());
    }

    long experts() const { return long(first.size()) - 1; }
    long count(long expert) const { return first[expert + 1] - first[expert]; }

  private:
    template <typename Id>
    void sort(const Id* ids) {
        const long all = tokens * choices;
        for (long pair = 0; pair < all; pair++) {
            STD_TORCH_CHECK(ids[pair] >= -1 && ids[pair] < experts(), "expert ", ids[pair], " of ", experts());
            if (ids[pair] >= 0) first[ids[pair] + 1]++;
        }
        for (long expert = 0; expert < experts(); expert++) first[expert + 1] += first[expert];
        pairs.resize(first.back());
        std::vector<long> next(first.begin(), first.end() - 1);
        for (long pair = 0; pair < all; pair++) {
            if (ids[pair] >= 0) pairs[next[ids[pair]]++] = pair;
        }
    }
};

// One of the two weights of all experts. tensors: packed, scale, zero_point and weight, each of all experts and empty where
// none has it; the segments as `index_experts` of native.py writes them; and [experts + 1] where each expert's begin.
class Stack {
    struct Entry {
        int64_t start, rows, group_size, bits, scale_is_bf16;
        int64_t codes, scale, zero_point;  // offsets in bytes; codes at 16 bits in `weight`; zero_point -1: symmetric
    };
    const uint8_t *packed, *scale, *zero_point, *weight;
    const Entry* entries;
    const int64_t* first;

  public:
    const long columns, experts, rows;

    Stack(const std::vector<Tensor>& tensors, long columns) : columns(columns), experts(tensors[5].numel() - 1), rows([&] {
        const Entry* all = (const Entry*)tensors[4].const_data_ptr();
        const long end = ((const int64_t*)tensors[5].const_data_ptr())[1];
        return all[end - 1].start + all[end - 1].rows;
    }()) {
        const auto bytes = [&](int i) { return (const uint8_t*)tensors[i].const_data_ptr(); };
        packed = bytes(0), scale = bytes(1), zero_point = bytes(2), weight = bytes(3);
        entries = (const Entry*)bytes(4);
        first = (const int64_t*)bytes(5);
    }

    // Rows [begin, end) of an expert; their places are counted from the expert's first row on.
    std::vector<Part> parts(long expert, long begin, long end) const {
        std::vector<Part> all;
        for (const Entry* e = entries + first[expert]; e < entries + first[expert + 1]; e++) {
            const long from = std::max(begin, e->start) - e->start, to = std::min(end, e->start + e->rows) - e->start;
            if (from >= to) continue;
            const long groups = e->bits == 16 ? 0 : columns / e->group_size;
            Weight w = {(e->bits == 16 ? weight : packed) + e->codes + from * columns * e->bits / 8, nullptr, nullptr,
                        e->scale_is_bf16, to - from, columns, e->group_size, e->bits};
            if (groups) w.scale = (const uint16_t*)(scale + e->scale) + from * groups;
            if (groups && e->zero_point >= 0) w.zero_point = zero_point + e->zero_point + from * groups;
            all.push_back({w, e->start + from});
        }
        return all;
    }
};

// What a thread takes at a time: rows of an expert.
struct Item {
    long expert, begin, end;
};

// Two for each thread or more, of about the same time: unpacking a row takes what two tokens take.
inline std::vector<Item> share_out(const Routed& routed, long rows, long threads) {
    constexpr long kUnpacking = 2, kRows = 32;  // panels and tiles have up to so many rows
    const auto cost = [&](long expert) { return routed.count(expert) ? routed.count(expert) + kUnpacking : 0; };
    long all = 0;
    for (long expert = 0; expert < routed.experts(); expert++) all += cost(expert);
    std::vector<Item> items;
    for (long expert = 0; expert < routed.experts(); expert++) {
        if (!cost(expert)) continue;
        const long wanted = threads == 1 ? 1 : (2 * threads * cost(expert) + all - 1) / all;
        const long step = (rows + wanted * kRows - 1) / (wanted * kRows) * kRows;
        for (long row = 0; row < rows; row += step) items.push_back({expert, row, std::min(rows, row + step)});
    }
    return items;
}

// Each pair's activations times its expert's weight: out [pairs, rows], all in bfloat16. activations(first, count, space)
// gives those of some pairs, one row after the other; `space` has room for them.
// multiply(parts, x, tokens, out, total) is as in layer_of.
template <typename Of, typename Multiply>
void multiply_experts(const Stack& stack, const Routed& routed, const Of& activations, uint16_t* out,
                      const Multiply& multiply) {
    const std::vector<Item> items = share_out(routed, stack.rows, omp_get_max_threads());
    const long columns = stack.columns;
#pragma omp parallel
    {
        omp_set_num_threads(1);  // of regions within this one
        thread_local AlignedSpace<uint16_t> space;
        const uint16_t* x = nullptr;
        long of = -1;
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < items.size(); i++) {
            const auto [expert, begin, end] = items[i];
            const long first = routed.first[expert], count = routed.count(expert);
            if (of != expert) x = activations(first, count, space.of(count * columns));
            of = expert;
            multiply(stack.parts(expert, begin, end), x, count, out + first * stack.rows, stack.rows);
        }
    }
}

// e^x, to the last bit or the one before; Cody and Waite's reduction, and the polynomial of Cephes. What is no number stays none.
inline __m256 exponential(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.3f), _mm256_min_ps(_mm256_set1_ps(88.3f), x));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
        y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(next));
    }
    y = _mm256_add_ps(_mm256_fmadd_ps(y, _mm256_mul_ps(x, x), x), _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

// silu(gate) * up of a row [gate, up], in float32. `columns` is a multiple of 8.
inline void silu_and_multiply(const uint16_t* row, long columns, uint16_t* to) {
    const auto load = [](const uint16_t* from) {
        const __m128i halves = _mm_loadu_si128((const __m128i*)from);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    };
    for (long k = 0; k < columns; k += 8) {
        const __m256 gate = load(row + k), up = load(row + columns + k);
        const __m256 minus = _mm256_xor_ps(gate, _mm256_set1_ps(-0.0f));
        const __m256 silu = _mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0f), exponential(minus)));
        alignas(32) float product[8];
        _mm256_store_ps(product, _mm256_mul_ps(up, silu));
        for (int i = 0; i < 8; i++) to[k + i] = to_bf16(product[i]);
    }
}

// A token's products [pairs, rows] times their weights [tokens, choices], summed in float32 in the order of its choices:
// out [tokens, rows] in bfloat16.
inline void add_up(const Routed& routed, const uint16_t* products, const float* weights, long rows, uint16_t* out) {
    std::vector<long> place(routed.tokens * routed.choices, -1);
    for (size_t i = 0; i < routed.pairs.size(); i++) place[routed.pairs[i]] = long(i);
    constexpr long kRows = 512;  // their sums stay in the first cache
    const long blocks = (rows + kRows - 1) / kRows;
#pragma omp parallel for schedule(static)
    for (long item = 0; item < routed.tokens * blocks; item++) {
        const long token = item / blocks, begin = item % blocks * kRows, count = std::min(kRows, rows - begin);
        float sums[kRows] = {0};
        for (long pair = token * routed.choices; pair < (token + 1) * routed.choices; pair++) {
            if (place[pair] < 0) continue;
            const uint16_t* const product = products + place[pair] * rows + begin;
            const float share = weights[pair];
            for (long i = 0; i < count; i++) sums[i] += share * from_bf16(product[i]);
        }
        for (long i = 0; i < count; i++) out[token * rows + begin + i] = to_bf16(sums[i]);
    }
}

inline void check_bfloat16(const Tensor& x) {
    STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::BFloat16,
                    "gamma::native_experts wants contiguous bfloat16 activations");
}

// The products with w13: x [tokens, columns] times the weights of each token's experts, ids [tokens, choices]: a tensor
// [pairs, rows], the pairs in the order of `Routed`.
template <typename Multiply>
Tensor experts_up(const Tensor& x, const Tensor& ids, const std::vector<Tensor>& tensors, const Multiply& multiply) {
    check_bfloat16(x);
    const long columns = x.size(1);
    const Stack stack(tensors, columns);
    const Routed routed(ids, stack.experts);
    const uint16_t* const all = (const uint16_t*)x.const_data_ptr();
    const auto of_tokens = [&](long first, long count, uint16_t* space) {
        const auto row = [&](long pair) { return all + routed.pairs[pair] / routed.choices * columns; };
        if (count == 1) return row(first);
        for (long m = 0; m < count; m++) std::memcpy(space + m * columns, row(first + m), columns * sizeof(uint16_t));
        return (const uint16_t*)space;
    };
    Tensor output = new_tensor({long(routed.pairs.size()), stack.rows});
    multiply_experts(stack, routed, of_tokens, (uint16_t*)output.mutable_data_ptr(), multiply);
    return output;
}

// The products with w2 of x [pairs, columns], in that order, and their sums [tokens, rows], weighted by
// weights [tokens, choices]. If `silu`, x is [pairs, 2*columns], gate and up.
template <typename Multiply>
Tensor experts_down(const Tensor& x, const Tensor& ids, const Tensor& weights, const std::vector<Tensor>& tensors, bool silu,
                    const Multiply& multiply) {
    check_bfloat16(x);
    STD_TORCH_CHECK(weights.is_contiguous() && weights.scalar_type() == torch::headeronly::ScalarType::Float,
                    "gamma::native_experts wants contiguous float32 weights");
    const long columns = silu ? x.size(1) / 2 : x.size(1);
    const Stack stack(tensors, columns);
    const Routed routed(ids, stack.experts);
    STD_TORCH_CHECK(x.size(0) == long(routed.pairs.size()), "gamma::native_experts got ", x.size(0), " rows of activations for ",
                    routed.pairs.size(), " choices");
    const uint16_t* const all = (const uint16_t*)x.const_data_ptr();
    const auto of_pairs = [&](long first, long count, uint16_t* space) {
        if (!silu) return all + first * columns;
        for (long m = 0; m < count; m++) silu_and_multiply(all + (first + m) * 2 * columns, columns, space + m * columns);
        return (const uint16_t*)space;
    };
    Tensor products = new_tensor({x.size(0), stack.rows}), output = new_tensor({routed.tokens, stack.rows});
    uint16_t* const made = (uint16_t*)products.mutable_data_ptr();
    multiply_experts(stack, routed, of_pairs, made, multiply);
    add_up(routed, made, (const float*)weights.const_data_ptr(), stack.rows, (uint16_t*)output.mutable_data_ptr());
    return output;
}

}  // namespace
