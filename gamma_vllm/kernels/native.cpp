// Products of a few activations with weights of 2 to 8 bits, read as the checkpoint stores them: a dense little-endian
// bit stream along K. For CPUs with AVX-512 VBMI and BF16. Compiled by native.py on first use; no library is needed.
//
// 32 codes are 4*bits bytes. vpermb brings the two bytes of each code into a lane of 16 bits, a shift brings the code to
// its lowest bits, and vpermw looks it up in a table of bfloat16 values, where the bits above the code do not matter:
// the table repeats. All codes are exact in bfloat16, so nothing is rounded but sums in float32.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kBlock = 32;   // codes in one step
constexpr int kMaxRows = 8;  // activations multiplied with one unpacked block

inline float from_bf16(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline uint16_t to_bf16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    return uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16);  // round to nearest even
}

inline float from_f16(uint16_t bits) { return _cvtsh_ss(bits); }

// What one module is: packed [rows, columns*bits/32], scale [rows, groups] (bfloat16 or float16), zeros [rows, groups] or
// null for a symmetric module.
struct Weight {
    const uint8_t* packed;
    const uint16_t* scale;
    bool scale_is_bf16;
    const uint8_t* zeros;
    long rows, columns, group_size;

    long groups() const { return columns / group_size; }
    float scale_at(long row, long group) const {
        const uint16_t bits = scale[row * groups() + group];
        return scale_is_bf16 ? from_bf16(bits) : from_f16(bits);
    }
};

template <int BITS>
struct Unpacker {
    static constexpr int kBytes = kBlock * BITS / 8;
    static constexpr __mmask64 kMask = (__mmask64(1) << kBytes) - 1;
    static constexpr bool kTwoParts = BITS > 6;  // more codes than a table has: the lower four bits and the rest apart
    static constexpr int kUpperBits = BITS > 4 ? BITS - 4 : 0;
    __m512i bytes, shifts, low, high;

    Unpacker() {
        alignas(64) uint8_t index[64];
        alignas(64) uint16_t shift[32], table[64];
        for (int i = 0; i < kBlock; i++) {
            index[2 * i] = uint8_t(i * BITS / 8);
            index[2 * i + 1] = uint8_t((i * BITS / 8 + 1) & 63);
            shift[i] = uint16_t(i * BITS % 8);
        }
        bytes = _mm512_load_si512(index);
        shifts = _mm512_load_si512(shift);
        if (kTwoParts) {
            for (int i = 0; i < 32; i++) {
                table[i] = to_bf16(float(i % 16));
                table[32 + i] = to_bf16(float(i % (1 << kUpperBits) * 16 - (1 << (BITS - 1))));
            }
        } else {
            for (int i = 0; i < 64; i++) table[i] = to_bf16(float(i % (1 << BITS)) - float(1 << (BITS - 1)));
        }
        low = _mm512_load_si512(table);
        high = _mm512_load_si512(table + 32);
    }

    // LAST: nothing may be read behind the block, which is the last of the module.
    template <bool LAST>
    __m512i lanes(const uint8_t* from) const {
        __m512i raw;
        if (LAST) {
            raw = _mm512_maskz_loadu_epi8(kMask, from);
        } else if (kBytes <= 16) {
            raw = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)from));
        } else {
            raw = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        }
        raw = _mm512_permutexvar_epi8(bytes, raw);
        return BITS == 8 ? raw : _mm512_srlv_epi16(raw, shifts);
    }

    // 32 values code - 2^(bits-1) in bfloat16; in two parts, the lower one, and `upper` gives the rest.
    __m512i values(__m512i lanes) const {
        if (BITS <= 5 || kTwoParts) return _mm512_permutexvar_epi16(lanes, low);
        return _mm512_permutex2var_epi16(low, lanes, high);
    }
    __m512i upper(__m512i lanes) const { return _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4), high); }
};

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

// A step of multiplication: 32 lanes of 16 bits, each with the window of `codes` neighbouring codes. The lanes are
// shifted `codes` times, so the activations are wanted in the order [codes, 32] instead of [32, codes].
template <int BITS>
struct Step {
    static constexpr int kCodes = BITS <= 4 ? 4 : BITS == 7 ? 1 : 2;
    static constexpr int kColumns = 32 * kCodes;
    static constexpr int kBytes = kColumns * BITS / 8;
    __m512i bytes, shifts[kCodes];
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
        for (int code = 0; code < kCodes; code++) {
            for (int lane = 0; lane < 32; lane++) shift[lane] = uint16_t(lane * kCodes * BITS % 8 + code * BITS);
            shifts[code] = _mm512_load_si512(shift);
        }
    }

    // `readable` bytes may be read; BOUNDED: they may be fewer than a whole load.
    template <bool BOUNDED>
    __m512i windows(const uint8_t* from, long readable) const {
        __m512i raw;
        if (BOUNDED) {
            raw = _mm512_maskz_loadu_epi8(readable >= 64 ? ~__mmask64(0) : (__mmask64(1) << readable) - 1, from);
        } else if (kBytes <= 32) {
            raw = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
        } else {
            raw = _mm512_loadu_si512(from);
        }
        return _mm512_permutexvar_epi8(bytes, raw);
    }
};

// [32, codes] to [codes, 32].
inline void reorder(const uint16_t* from, int codes, uint16_t* to) {
    if (codes == 1) {
        std::memcpy(to, from, 32 * sizeof(uint16_t));
        return;
    }
    alignas(64) uint16_t order[32];
    for (int code = 0; code < codes; code++) {
        for (int i = 0; i < 32; i++) order[i] = uint16_t((i * codes + code) & 63);
        const __m512i every = _mm512_load_si512(order);
        const auto pick = [&](const uint16_t* at) {
            return _mm512_permutex2var_epi16(_mm512_loadu_si512(at), every, _mm512_loadu_si512(at + 32));
        };
        const __m512i first = pick(from);
        const __m512i all = codes == 2 ? first : _mm512_inserti64x4(first, _mm512_castsi512_si256(pick(from + 64)), 1);
        _mm512_storeu_si512(to + code * 32, all);
    }
}

// Activations as the steps want them, padded with zeros to whole steps, and their sums over each group.
struct Activations {
    std::vector<uint16_t> values;
    std::vector<float> sums;
    long stride, groups;

    Activations(const uint16_t* x, long tokens, long columns, long group_size, int codes, bool want_sums)
        : stride((columns + 32 * codes - 1) / (32 * codes) * (32 * codes)), groups((columns / group_size + 15) / 16 * 16) {
        values.resize(tokens * stride + 32);
        if (want_sums) sums.resize(tokens * groups);
        for (long token = 0; token < tokens; token++, x += columns) {
            uint16_t* to = values.data() + token * stride;
            const long step = 32 * codes;
            for (long k = 0; k < columns; k += step) {
                if (k + step <= columns) {
                    reorder(x + k, codes, to + k);
                } else {
                    uint16_t last[128] = {0};
                    std::memcpy(last, x + k, (columns - k) * sizeof(uint16_t));
                    reorder(last, codes, to + k);
                }
            }
            if (!want_sums) continue;
            for (long group = 0; group < columns / group_size; group++) {
                __m512 sum = _mm512_setzero_ps();
                for (long k = group * group_size; k < (group + 1) * group_size; k += 16) {
                    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(x + k)));
                    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
                }
                sums[token * groups + group] = _mm512_reduce_add_ps(sum);
            }
        }
    }
};

// Which scale each of the 16 sums of a step takes, counted from the step's first group.
template <int BITS>
__m512i scale_of_lane(long group_size) {
    alignas(64) int32_t index[16];
    for (int lane = 0; lane < 16; lane++) index[lane] = int32_t(lane * 2 * Step<BITS>::kCodes / group_size);
    return _mm512_load_si512(index);
}

// One row of the weight times M rows of activations.
template <int BITS, int M, bool BOUNDED>
void multiply_row(const Weight& w, const Step<BITS>& step, __m512i scale_of_lane, long row, const uint16_t* x,
                  const Activations& all, const float* sums, float* scales, float* out, long out_stride) {
    constexpr int kCodes = Step<BITS>::kCodes, kColumns = Step<BITS>::kColumns;
    const long row_bytes = w.columns * BITS / 8, groups = w.groups();
    const uint8_t* const begin = w.packed + row * row_bytes;
    __m512 total[M];
    for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
    for (long group = 0; group < groups; group += 16) {
        const long left = groups - group;
        const __mmask16 mask = left >= 16 ? 0xFFFF : __mmask16((1 << left) - 1);
        const __m256i halves = _mm256_maskz_loadu_epi16(mask, w.scale + row * groups + group);
        const __m512 scale = w.scale_is_bf16
                                 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))
                                 : _mm512_cvtph_ps(halves);
        _mm512_storeu_ps(scales + group, scale);
        if (w.zeros) {
            const __m128i zeros = _mm_maskz_loadu_epi8(mask, w.zeros + row * groups + group);
            const __m512 middle = _mm512_set1_ps(float(1 << (BITS - 1)));
            const __m512 shift = _mm512_sub_ps(middle, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)));
            const __m512 scaled = _mm512_mul_ps(shift, scale);  // zero behind the last group, as the scale is
            for (int m = 0; m < M; m++) {
                total[m] = _mm512_fmadd_ps(scaled, _mm512_loadu_ps(sums + m * all.groups + group), total[m]);
            }
        }
    }
    const float* scale = scales;
    const long scales_a_step = kColumns / w.group_size, steps_a_scale = w.group_size / kColumns;
    for (long k = 0, number = 0; k < w.columns; k += kColumns, number++) {
        const __m512i windows = step.template windows<BOUNDED>(begin + k * BITS / 8, row_bytes - k * BITS / 8);
        __m512 part[M];
        for (int m = 0; m < M; m++) part[m] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int code = 0; code < kCodes; code++) {
            const __m512i lanes = _mm512_srlv_epi16(windows, step.shifts[code]);
            const __m512bh value = as_bf16(step.table.values(lanes));
            const uint16_t* column = x + k + code * 32;
            for (int m = 0; m < M; m++) {
                const __m512bh activation = as_bf16(_mm512_loadu_si512(column + m * all.stride));
                part[m] = _mm512_dpbf16_ps(part[m], value, activation);
                if (step.table.kTwoParts) {
                    part[m] = _mm512_dpbf16_ps(part[m], as_bf16(step.table.upper(lanes)), activation);
                }
            }
        }
        const __m512 of_lanes = _mm512_permutexvar_ps(scale_of_lane, _mm512_loadu_ps(scale));
        for (int m = 0; m < M; m++) total[m] = _mm512_fmadd_ps(part[m], of_lanes, total[m]);
        scale += scales_a_step ? scales_a_step : (number + 1) % steps_a_scale == 0;
    }
    for (int m = 0; m < M; m++) out[m * out_stride + row] = _mm512_reduce_add_ps(total[m]);
}

template <int BITS, int M>
void multiply_all(const Weight& w, const uint16_t* x, const Activations& all, const float* sums, float* out,
                  long out_stride) {
    const Step<BITS> step;
    const __m512i of_lane = scale_of_lane<BITS>(w.group_size);
    // Rows from whose last step a whole load stays inside the weight.
    const long row_bytes = w.columns * BITS / 8, last_step = (w.columns - 1) / step.kColumns * step.kBytes;
    const long last_row = w.rows - 1 - (last_step + 64 > row_bytes ? (last_step + 64 - row_bytes + row_bytes - 1) / row_bytes : 0);
#pragma omp parallel
    {
        std::vector<float> scales(w.groups() + 32);
#pragma omp for schedule(static)
        for (long row = 0; row < w.rows; row++) {
            if (row <= last_row) {
                multiply_row<BITS, M, false>(w, step, of_lane, row, x, all, sums, scales.data(), out, out_stride);
            } else {
                multiply_row<BITS, M, true>(w, step, of_lane, row, x, all, sums, scales.data(), out, out_stride);
            }
        }
    }
}

template <int BITS>
void multiply(const Weight& w, const uint16_t* x, long tokens, float* out, long out_stride) {
    const Activations all(x, tokens, w.columns, w.group_size, Step<BITS>::kCodes, w.zeros != nullptr);
    for (long done = 0; done < tokens;) {
        const uint16_t* rows = all.values.data() + done * all.stride;
        const float* sums = w.zeros ? all.sums.data() + done * all.groups : nullptr;
        float* place = out + done * out_stride;
        const long left = tokens - done;
        if (left >= kMaxRows) {
            multiply_all<BITS, kMaxRows>(w, rows, all, sums, place, out_stride);
            done += kMaxRows;
        } else if (left >= 4) {
            multiply_all<BITS, 4>(w, rows, all, sums, place, out_stride);
            done += 4;
        } else if (left >= 2) {
            multiply_all<BITS, 2>(w, rows, all, sums, place, out_stride);
            done += 2;
        } else {
            multiply_all<BITS, 1>(w, rows, all, sums, place, out_stride);
            done += 1;
        }
    }
}

template <int BITS>
void dequantize(const Weight& w, void* out, bool to_bfloat16) {
    const Unpacker<BITS> unpack;
    const long blocks = w.group_size / kBlock, groups = w.groups();
#pragma omp parallel for schedule(static)
    for (long row = 0; row < w.rows; row++) {
        const uint8_t* from = w.packed + row * (w.columns * BITS / 8);
        uint16_t* halves = (uint16_t*)out + row * w.columns;
        float* floats = (float*)out + row * w.columns;
        for (long group = 0; group < groups; group++) {
            const __m512 scale = _mm512_set1_ps(w.scale_at(row, group));
            const float zero = w.zeros ? float(1 << (BITS - 1)) - float(w.zeros[row * groups + group]) : 0.0f;
            const __m512 shift = _mm512_set1_ps(zero);
            for (long block = 0; block < blocks; block++, from += Unpacker<BITS>::kBytes) {
                const __m512i lanes = unpack.template lanes<true>(from), values = unpack.values(lanes);
                __m512 both[2];
                for (int half = 0; half < 2; half++) {
                    const auto widen = [half](__m512i v) {
                        const __m256i part = half ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v);
                        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
                    };
                    __m512 value = widen(values);
                    if (unpack.kTwoParts) value = _mm512_add_ps(value, widen(unpack.upper(lanes)));
                    both[half] = _mm512_mul_ps(_mm512_add_ps(value, shift), scale);
                }
                if (to_bfloat16) {
                    _mm512_storeu_si512(halves, (__m512i)_mm512_cvtne2ps_pbh(both[1], both[0]));
                    halves += kBlock;
                } else {
                    _mm512_storeu_ps(floats, both[0]);
                    _mm512_storeu_ps(floats + 16, both[1]);
                    floats += kBlock;
                }
            }
        }
    }
}

}  // namespace

// Both return 0, or -1 for a width that they do not know.
extern "C" int gamma_multiply(const void* packed, const void* scale, int scale_is_bf16, const void* zeros, long rows,
                              long columns, long group_size, int bits, const void* x, long tokens, float* out,
                              long out_stride) {
    const Weight w{(const uint8_t*)packed, (const uint16_t*)scale, scale_is_bf16 != 0, (const uint8_t*)zeros,
                   rows,                   columns,                group_size};
    const uint16_t* activations = (const uint16_t*)x;
    switch (bits) {
        case 2: multiply<2>(w, activations, tokens, out, out_stride); return 0;
        case 3: multiply<3>(w, activations, tokens, out, out_stride); return 0;
        case 4: multiply<4>(w, activations, tokens, out, out_stride); return 0;
        case 5: multiply<5>(w, activations, tokens, out, out_stride); return 0;
        case 6: multiply<6>(w, activations, tokens, out, out_stride); return 0;
        case 7: multiply<7>(w, activations, tokens, out, out_stride); return 0;
        case 8: multiply<8>(w, activations, tokens, out, out_stride); return 0;
        default: return -1;
    }
}

extern "C" int gamma_dequantize(const void* packed, const void* scale, int scale_is_bf16, const void* zeros, long rows,
                                long columns, long group_size, int bits, void* out, int to_bfloat16) {
    const Weight w{(const uint8_t*)packed, (const uint16_t*)scale, scale_is_bf16 != 0, (const uint8_t*)zeros,
                   rows,                   columns,                group_size};
    switch (bits) {
        case 2: dequantize<2>(w, out, to_bfloat16); return 0;
        case 3: dequantize<3>(w, out, to_bfloat16); return 0;
        case 4: dequantize<4>(w, out, to_bfloat16); return 0;
        case 5: dequantize<5>(w, out, to_bfloat16); return 0;
        case 6: dequantize<6>(w, out, to_bfloat16); return 0;
        case 7: dequantize<7>(w, out, to_bfloat16); return 0;
        case 8: dequantize<8>(w, out, to_bfloat16); return 0;
        default: return -1;
    }
}
