// gemv: products of a few tokens' activations (decode), code by code. Codes are exact in bfloat16, each group's sum
// in float32 is multiplied by its scale, so nothing is rounded but the sums.
//
// Up to 7 bits a code becomes the bfloat16 value 128 + code by writing it into the mantissa of 128; what that adds to a
// group's sum is 128 times the sum of its activations, and is taken off. Where the mantissa of 7 bits has room, the next
// code stands in it as it lies, 2^bits times as large, and its activation is that much smaller, which is exact: a shift
// for two codes of 3 bits, or for three of 2. 8 bits are two looked-up parts.

#pragma once

#include "native_avx512_codes.h"

namespace {

constexpr int kGemvBatch = 4;  // activations multiplied with one unpacked code; more would not stay in registers
constexpr long kPrefetchBytes = 16384;  // how far ahead of their use bytes are prefetched, half a microsecond or so

// As many neighbouring codes as a lane of 16 bits holds, wherever in a byte they begin.
constexpr int most_codes(int bits) { return bits == 2 ? 8 : bits <= 4 ? 4 : 2; }

// A step of multiplication: 32 lanes of 16 bits, each with the window of CODES neighbouring codes, which are taken out of
// all lanes one after the other; so the activations are wanted in the order [codes, 32] instead of [32, codes].
template <int BITS, int CODES = most_codes(BITS)>
struct Step {
    static constexpr int kBits = BITS, kCodes = CODES;
    static constexpr int kColumns = 32 * kCodes;
    static constexpr int kBytes = kColumns * BITS / 8;
    static constexpr bool kInMantissa = BITS <= 7;
    static constexpr int kAdded = kInMantissa ? 128 : -(1 << (BITS - 1));  // what a value is beyond its code
    static constexpr bool kInPlace = BITS * kCodes == 16;  // a lane's codes are its own bits
    static constexpr int kOfShift = kInMantissa ? std::min(7 / BITS, kCodes) : 1;  // codes that a shift brings into place
    static constexpr int kShifts = (kCodes + kOfShift - 1) / kOfShift;
    __m512i bytes, shifts[kShifts];
    const Unpacker<BITS> table;

    Step() {
        alignas(64) uint8_t index[64];
        alignas(64) uint16_t shift[32];
        for (int lane = 0; lane < 32; lane++) {
            const int bit = lane * kCodes * BITS;
            index[2 * lane] = uint8_t(bit / 8);
            index[2 * lane + 1] = uint8_t((bit / 8 + 1) & 63);  // behind the last byte only bits that do not count
        }
        bytes = _mm512_load_si512(index);
        for (int i = 0; i < kShifts; i++) {
            for (int lane = 0; lane < 32; lane++) shift[lane] = uint16_t(lane * kCodes * BITS % 8 + i * kOfShift * BITS);
            shifts[i] = _mm512_load_si512(shift);
        }
    }

    // By what the value of a code is multiplied beside its code, 2^(bits*...).
    static constexpr int place(int code) { return code % kOfShift * BITS; }

    // BOUNDED: nothing behind the `readable` bytes may be read, for they end the module.
    template <bool BOUNDED>
    GAMMA_INNER __m512i windows(const uint8_t* from, long readable) const {
        __m512i raw;
        if (BOUNDED) {
            raw = _mm512_maskz_loadu_epi8(readable >= 64 ? ~__mmask64(0) : (__mmask64(1) << readable) - 1, from);
        } else if (kBytes <= 32) {
            raw = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        } else {
            raw = _mm512_loadu_si512(from);
        }
        return kInPlace ? raw : _mm512_permutexvar_epi8(bytes, raw);
    }

    // The lanes with code `code` in place.
    GAMMA_INNER __m512i shifted(__m512i windows, int code) const {
        return kInPlace && code < kOfShift ? windows : _mm512_srlv_epi16(windows, shifts[code / kOfShift]);
    }

    // 32 values in bfloat16, of code `code` in lanes where it is in place.
    GAMMA_INNER __m512bh values(__m512i lanes, int code) const {
        if (!kInMantissa) return as_bf16(table.values(lanes));
        const __m512i bits = _mm512_set1_epi16(((1 << BITS) - 1) << place(code));
        const __m512i one_hundred_twenty_eight = _mm512_set1_epi16(0x4300);
        return as_bf16(_mm512_ternarylogic_epi32(lanes, bits, one_hundred_twenty_eight, 0xEA));  // (a & b) | c
    }
};

// [32, codes] to [codes, 32].
inline void reorder(const uint16_t* from, int codes, uint16_t* to) {
    if (codes == 1) {
        std::memcpy(to, from, 32 * sizeof(uint16_t));
        return;
    }
    alignas(64) uint16_t order[32];
    const int count = 64 / codes;  // of each code in two vectors
    const __mmask32 mask = ~__mmask32(0) >> (32 - count);
    for (int code = 0; code < codes; code++, to += 32) {
        for (int i = 0; i < 32; i++) order[i] = uint16_t((i * codes + code) & 63);
        const __m512i every = _mm512_load_si512(order);
        for (int i = 0; i < codes / 2; i++) {
            const __m512i first = _mm512_loadu_si512(from + 64 * i), second = _mm512_loadu_si512(from + 64 * i + 32);
            _mm512_mask_storeu_epi16(to + i * count, mask, _mm512_permutex2var_epi16(first, every, second));
        }
    }
}

// 32 activations divided by 2^places.
GAMMA_INNER void scale_down(uint16_t* values, int places) {
    const __m512 factor = _mm512_set1_ps(1.0f / float(1 << places));
    const __m512i all = _mm512_loadu_si512(values);
    const __m512 low = _mm512_mul_ps(widen(_mm512_castsi512_si256(all)), factor);
    const __m512 high = _mm512_mul_ps(widen(_mm512_extracti64x4_epi64(all, 1)), factor);
    _mm512_storeu_si512(values, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// What a group's products are beyond those of its codes, of 16 neighbouring columns, for each of their activations.
template <typename Of>
inline __m512 beyond_codes() {
    alignas(64) float factors[16];
    for (int i = 0; i < 16; i++) factors[i] = float(Of::kAdded) / float(1 << Of::place(i % Of::kCodes));
    return _mm512_load_ps(factors);
}

// The sum of a group's activations, and what the steps add to the group beyond its codes.
inline void sum_group(const uint16_t* x, long group_size, __m512 beyond, float& sum, float& added) {
    __m512 all = _mm512_setzero_ps(), more = _mm512_setzero_ps();
    for (long k = 0; k < group_size; k += 16) {
        const __m512 values = widen(_mm256_loadu_si256((const __m256i*)(x + k)));
        all = _mm512_add_ps(all, values);
        more = _mm512_fmadd_ps(values, beyond, more);
    }
    sum = _mm512_reduce_add_ps(all);
    added = _mm512_reduce_add_ps(more);
}

// A step's activations as it wants them.
template <typename Of>
inline void prepare_step(const uint16_t* x, uint16_t* to) {
    reorder(x, Of::kCodes, to);
    for (int code = 0; code < Of::kCodes; code++) {
        if (Of::place(code)) scale_down(to + 32 * code, Of::place(code));
    }
}

// Activations as the steps want them, padded with zeros to whole steps; their sums over each group, and what the steps add
// to a group beyond its codes. A vector that lies across two lines of the cache takes twice as long to load, and these are
// loaded for each row of the weight.
template <int BITS>
class Activations {
    using Of = Step<BITS>;
    struct alignas(64) Line {
        uint16_t values[32];
    };
    std::vector<Line> lines;
    std::vector<float> sums, added;

  public:
    const long stride, groups;

    Activations(const uint16_t* x, long tokens, long columns, long group_size)
        : stride((columns + Of::kColumns - 1) / Of::kColumns * Of::kColumns),
          groups((columns / group_size + 15) / 16 * 16) {
        lines.resize(tokens * stride / 32);
        sums.resize(tokens * groups);
        added.resize(tokens * groups);
        const __m512 beyond = beyond_codes<Of>();
        for (long token = 0; token < tokens; token++, x += columns) {
            uint16_t* to = lines[token * stride / 32].values;
            for (long k = 0; k < columns; k += Of::kColumns) {
                if (k + Of::kColumns <= columns) {
                    prepare_step<Of>(x + k, to + k);
                } else {
                    uint16_t last[256] = {0};
                    std::memcpy(last, x + k, (columns - k) * sizeof(uint16_t));
                    prepare_step<Of>(last, to + k);
                }
            }
            for (long group = 0; group < columns / group_size; group++) {
                const long at = token * groups + group;
                sum_group(x + group * group_size, group_size, beyond, sums[at], added[at]);
            }
        }
    }

    const uint16_t* of(long token) const { return lines[token * stride / 32].values; }
    const float* sums_of(long token) const { return sums.data() + token * groups; }
    const float* added_to(long token) const { return added.data() + token * groups; }
};

// For each step of 16 groups, which of their scales each of the 16 sums takes.
template <int BITS>
struct ScaleOrder {
    alignas(64) int32_t lanes[16 * 128 / Step<BITS>::kColumns][16];  // groups have at most 128 columns

    // Made once: it takes microseconds. Groups have 32, 64 or 128 columns.
    static const ScaleOrder& of(long group_size) {
        static const ScaleOrder orders[] = {ScaleOrder(32), ScaleOrder(64), ScaleOrder(128)};
        return orders[group_size / 64];
    }

  private:
    explicit ScaleOrder(long group_size) {
        for (long step = 0; step < 16 * group_size / Step<BITS>::kColumns; step++) {
            for (int lane = 0; lane < 16; lane++) {
                lanes[step][lane] = int32_t((step * Step<BITS>::kColumns + lane * 2 * Step<BITS>::kCodes) / group_size);
            }
        }
    }
};

inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = to_bf16(value); }

// The sums of the lanes of each of four vectors.
GAMMA_INNER __m128 sums_of_lanes(const __m512* v) {
    const auto pairs = [](__m512 a, __m512 b) {
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    };
    const __m512d first = pairs(v[0], v[1]), second = pairs(v[2], v[3]);
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Prefetches `bytes` from an address that is used kPrefetchBytes later.
GAMMA_INNER void prefetch(const void* from, long bytes) {
    for (long at = 0; at < bytes; at += 64) _mm_prefetch((const char*)from + at, _MM_HINT_T0);
}

// R neighbouring rows of the weight times M activations from `token` on, to out[M, rows].
template <int BITS, int M, int R, bool BOUNDED, typename Out>
void multiply_rows(const Weight& w, const Step<BITS>& step, const ScaleOrder<BITS>& order, long row,
                   const Activations<BITS>& all, long token, Out* out, long out_stride) {
    constexpr int kCodes = Step<BITS>::kCodes, kColumns = Step<BITS>::kColumns;
    const long row_bytes = w.columns * BITS / 8, groups = w.groups();
    const uint8_t* const begin = w.packed + row * row_bytes;
    const uint16_t* const x = all.of(token);
    const float *const sums = all.sums_of(token), *const added = all.added_to(token);
    // They are few, but each would be waited for.
    prefetch((const uint8_t*)(w.scale + row * groups) + kPrefetchBytes / 8, 2 * R * groups);
    if (w.zero_point) prefetch(w.zero_point + row * groups + kPrefetchBytes / 8, R * groups);
    __m512 total[R][M];
    for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) total[r][m] = _mm512_setzero_ps();
    }
    long k = 0;
    for (long group = 0; group < groups; group += 16) {
        const long left = groups - group;
        const __mmask16 mask = left >= 16 ? 0xFFFF : __mmask16((1 << left) - 1);
        __m512 scale[R];
        for (int r = 0; r < R; r++) {
            const __m256i halves = _mm256_maskz_loadu_epi16(mask, w.scale + (row + r) * groups + group);
            scale[r] = w.scale_is_bf16 ? widen(halves) : _mm512_cvtph_ps(halves);
            // A symmetric module has its zero point in the middle.
            __m512i zeros = _mm512_set1_epi32(1 << (BITS - 1));
            if (w.zero_point) {
                zeros = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, w.zero_point + (row + r) * groups + group));
            }
            const __m512 zero_points = _mm512_cvtepi32_ps(zeros);
            for (int m = 0; m < M; m++) {
                const long at = m * all.groups + group;
                const __m512 off = _mm512_fmadd_ps(zero_points, _mm512_loadu_ps(sums + at), _mm512_loadu_ps(added + at));
                total[r][m] = _mm512_fnmadd_ps(off, scale[r], total[r][m]);  // the scale behind the last group is zero
            }
        }
        const int32_t(*of_lanes)[16] = order.lanes;
        for (const long end = std::min(w.columns, (group + 16) * w.group_size); k < end; k += kColumns, of_lanes++) {
            // In the order of memory, so that the caches' own prefetchers see one stream.
            prefetch(begin + kPrefetchBytes + k * R * BITS / 8, R * Step<BITS>::kBytes);
            __m512i windows[R];
            __m512 part[R][M];
            for (int r = 0; r < R; r++) {
                const long at = r * row_bytes + k * BITS / 8;
                windows[r] = step.template windows<BOUNDED>(begin + at, row_bytes - k * BITS / 8);
                for (int m = 0; m < M; m++) part[r][m] = _mm512_setzero_ps();
            }
#pragma GCC unroll 8
            for (int code = 0; code < kCodes; code++) {
                const uint16_t* column = x + k + code * 32;
                __m512bh activation[M];
                for (int m = 0; m < M; m++) activation[m] = as_bf16(_mm512_loadu_si512(column + m * all.stride));
                for (int r = 0; r < R; r++) {
                    const __m512i lanes = step.shifted(windows[r], code);
                    const __m512bh value = step.values(lanes, code);
                    for (int m = 0; m < M; m++) part[r][m] = _mm512_dpbf16_ps(part[r][m], value, activation[m]);
                    if (!step.kInMantissa) {
                        const __m512bh upper = as_bf16(step.table.upper(lanes));
                        for (int m = 0; m < M; m++) part[r][m] = _mm512_dpbf16_ps(part[r][m], upper, activation[m]);
                    }
                }
            }
            for (int r = 0; r < R; r++) {
                const __m512 of_step = _mm512_permutexvar_ps(_mm512_load_si512(of_lanes), scale[r]);
                for (int m = 0; m < M; m++) total[r][m] = _mm512_fmadd_ps(part[r][m], of_step, total[r][m]);
            }
        }
    }
    // One way of adding up for all R and M: where a module is cut, and how many tokens there are, must not be seen.
    constexpr int kFours = (R * M + 3) / 4;
    alignas(16) float of_rows[4 * kFours];
    const __m512* const vectors = &total[0][0];
    for (int i = 0; i < 4 * kFours; i += 4) {
        __m512 four[4];
        for (int j = 0; j < 4; j++) four[j] = vectors[std::min(i + j, R * M - 1)];
        _mm_store_ps(of_rows + i, sums_of_lanes(four));
    }
    for (int m = 0; m < M; m++) {
        Out of_token[R];  // neighbours, so that they are rounded and stored together
        for (int r = 0; r < R; r++) put(of_token + r, of_rows[r * M + m]);
        std::memcpy(out + m * out_stride + row, of_token, sizeof(of_token));
    }
}

// M activations from `token` on, within a parallel region: each thread takes its rows and does not wait for the others.
template <int BITS, int M, typename Out>
void multiply_all(const Weight& w, const Activations<BITS>& all, long token, Out* out, long out_stride) {
    constexpr int R = M == 1 ? 4 : 2;
    static const Step<BITS> made;
    const Step<BITS> step = made;  // a copy of its own stays in registers
    const ScaleOrder<BITS>& order = ScaleOrder<BITS>::of(w.group_size);
    // From the rows behind `safe` a whole load could reach behind the weight.
    const long row_bytes = w.columns * BITS / 8, last_step = (w.columns - 1) / step.kColumns * step.kBytes;
    const long over = last_step + 64 - row_bytes;
    const long safe = std::max(0L, w.rows - (over > 0 ? (over + row_bytes - 1) / row_bytes : 0)) / R * R;
#pragma omp for schedule(static) nowait
    for (long row = 0; row < safe; row += R) {
        multiply_rows<BITS, M, R, false>(w, step, order, row, all, token, out, out_stride);
    }
#pragma omp for schedule(static) nowait
    for (long row = safe; row < w.rows; row++) {
        multiply_rows<BITS, M, 1, true>(w, step, order, row, all, token, out, out_stride);
    }
}

// x [tokens, columns] in bfloat16 times the weight: out [tokens, rows], float32 or bfloat16. Within a parallel region,
// by all.
template <int BITS, typename Out>
void gemv(const Weight& w, const uint16_t* x, long tokens, Out* out, long out_stride) {
    prefetch(w.packed, kPrefetchBytes);  // meanwhile the activations are made ready
    const Activations<BITS> all(x, tokens, w.columns, w.group_size);
    for (long token = 0; token < tokens;) {
        Out* place = out + token * out_stride;
        const long left = tokens - token;
        if (left >= kGemvBatch) {
            multiply_all<BITS, kGemvBatch>(w, all, token, place, out_stride);
            token += kGemvBatch;
        } else if (left >= 2) {
            multiply_all<BITS, 2>(w, all, token, place, out_stride);
            token += 2;
        } else {
            multiply_all<BITS, 1>(w, all, token, place, out_stride);
            token += 1;
        }
    }
}

}  // namespace
