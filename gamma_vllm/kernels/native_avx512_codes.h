// How codes become bfloat16 values.
//
// 32 codes are 4*bits bytes of a dense little-endian bit stream along K. vpermb brings the two bytes of each code into a
// lane of 16 bits, a shift brings the code to its lowest bits, and vpermw looks it up in a table of bfloat16 values, where
// the bits above the code do not matter: the table repeats.

#pragma once

#include "native_layout.h"

namespace {

GAMMA_INNER __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

GAMMA_INNER __m512 widen(__m256i halves) {  // 16 of bfloat16
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Of at most 16 groups that follow each other, what scale_at and shift_at give.
GAMMA_INNER void read_groups(const Weight& w, long first, long count, float* scales, float* shifts) {
    const __mmask16 there = __mmask16((1u << count) - 1);
    const __m256i halves = _mm256_maskz_loadu_epi16(there, w.scale + first);
    _mm512_store_ps(scales, w.scale_is_bf16 ? widen(halves) : _mm512_cvtph_ps(halves));
    __m512 shift = _mm512_setzero_ps();
    if (w.zero_point) {
        const __m512i points = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, w.zero_point + first));
        shift = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(1 << (w.bits - 1)), points));
    }
    _mm512_store_ps(shifts, shift);
}

template <int BITS>
struct Unpacker {
    static constexpr int kBytes = kBlock * BITS / 8;
    static constexpr __mmask64 kMask = ~__mmask64(0) >> (64 - kBytes);
    static constexpr bool kTwoParts = BITS > 6;  // more codes than a table has: the lower four bits and the rest apart
    static constexpr int kUpperBits = BITS > 4 ? BITS - 4 : 0;
    static constexpr int kTableParts = BITS <= 4 ? 1 : BITS == 5 ? 2 : 4;  // vectors of 16 floats
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

    // 32 lanes, each with a code in its lowest bits.
    GAMMA_INNER __m512i lanes(const uint8_t* from) const {
        const __m512i raw = _mm512_permutexvar_epi8(bytes, _mm512_maskz_loadu_epi8(kMask, from));
        return BITS == 8 ? raw : _mm512_srlv_epi16(raw, shifts);
    }

    // 32 values code - 2^(bits-1) in bfloat16; in two parts, the lower one, and `upper` gives the rest.
    GAMMA_INNER __m512i values(__m512i lanes) const { return look_up(lanes, low, high); }
    GAMMA_INNER __m512i upper(__m512i lanes) const { return _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4), high); }

    GAMMA_INNER static __m512i look_up(__m512i lanes, __m512i low, __m512i high) {
        if (BITS == 6) return _mm512_permutex2var_epi16(low, lanes, high);
        return _mm512_permutexvar_epi16(lanes, low);
    }

    // Columns [begin, end) of a row, both at the border of a group, as (code - zero) * scale; each 32 `step` after the last.
    void dequantize(const Weight& w, long row, long begin, long end, uint16_t* to, long step = kBlock) const {
        const uint8_t* from = w.packed + (row * w.columns + begin) * BITS / 8;
        const auto part = [](__m512i values, int half) {
            return widen(half ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values));
        };
        const auto narrow = [](__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); };
        const long first = row * w.groups() + begin / w.group_size, count = (end - begin) / w.group_size;
        alignas(64) float scales[16], shifts[16];
        for (long group = 0; group < count; group++) {
            if (group % 16 == 0) read_groups(w, first + group, std::min(count - group, 16L), scales, shifts);
            const __m512 scale = _mm512_set1_ps(scales[group % 16]), shift = _mm512_set1_ps(shifts[group % 16]);
            const auto scaled = [&](__m512 value) { return _mm512_mul_ps(_mm512_add_ps(value, shift), scale); };
            __m512i scaled_low, scaled_high;  // all values that a code of this group can have
            if (!kTwoParts) {
                const __m512 first = scaled(part(low, 0)), second = BITS <= 4 ? first : scaled(part(low, 1));
                scaled_low = scaled_high = narrow(first, second);
                if (BITS == 6) scaled_high = narrow(scaled(part(high, 0)), scaled(part(high, 1)));
            }
            for (long block = 0; block < w.group_size; block += kBlock, from += kBytes, to += step) {
                if (BITS == 8) {
                    const auto value = [&](int h) {
                        const __m128i bytes = _mm_loadu_si128((const __m128i*)(from + 16 * h));
                        const __m512i codes = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(128));
                        return scaled(_mm512_cvtepi32_ps(codes));
                    };
                    _mm512_storeu_si512(to, narrow(value(0), value(1)));
                    continue;
                }
                const __m512i codes = lanes(from);
                if (kTwoParts) {
                    const __m512i lower = values(codes), rest = upper(codes);
                    const auto both = [&](int h) { return scaled(_mm512_add_ps(part(lower, h), part(rest, h))); };
                    _mm512_storeu_si512(to, narrow(both(0), both(1)));
                } else {
                    _mm512_storeu_si512(to, look_up(codes, scaled_low, scaled_high));
                }
            }
        }
    }

    // The same in float32.
    void dequantize(const Weight& w, long row, long begin, long end, float* to) const {
        const uint8_t* from = w.packed + (row * w.columns + begin) * BITS / 8;
        for (long group = begin / w.group_size; group * w.group_size < end; group++) {
            const __m512 scale = _mm512_set1_ps(w.scale_at(row, group)), shift = _mm512_set1_ps(w.shift_at(row, group));
            for (long block = 0; block < w.group_size; block += kBlock, from += kBytes, to += kBlock) {
                const __m512i codes = lanes(from), lower = values(codes);
                for (int half = 0; half < 2; half++) {
                    const auto part = [half](__m512i v) {
                        return widen(half ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v));
                    };
                    __m512 value = part(lower);
                    if (kTwoParts) value = _mm512_add_ps(value, part(upper(codes)));
                    _mm512_storeu_ps(to + 16 * half, _mm512_mul_ps(_mm512_add_ps(value, shift), scale));
                }
            }
        }
    }
};

// Calls work(Unpacker<bits>). False for a width that nothing here unpacks.
template <typename Work>
bool with_unpacker(long bits, const Work& work) {
    switch (bits) {
        case 2: work(Unpacker<2>()); return true;
        case 3: work(Unpacker<3>()); return true;
        case 4: work(Unpacker<4>()); return true;
        case 5: work(Unpacker<5>()); return true;
        case 6: work(Unpacker<6>()); return true;
        case 8: work(Unpacker<8>()); return true;
        default: return false;
    }
}

}  // namespace
