// Per 64 pairs, each member's votes are two words of bits, "a's reward is higher" and "a's reward is no lower": added bit by
// bit, they are half votes (0, 1, 2). Sums without p are counts of these bits, exact in any order. Sums with p are added in
// the order of the pairs within pieces of a fixed size and then piece by piece, so that threads don't change them; ties,
// which are rare, have sums of their own.
//
// Everything marked INLINE becomes part of three functions, compiled for any CPU, for AVX2 and for AVX-512.

#include "evaluator.hpp"

#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if HAS_X86_CODE
#include <immintrin.h>
#endif

namespace {

using std::uint64_t;

constexpr Index chunk_size = 256;    // pairs whose rewards are gathered at a time
constexpr Index piece_size = 16384;  // pairs of one prompt whose sums with p are added up before they meet others

template <Path path> constexpr int vector_bytes = path == Path::portable ? 16 : 32;

struct SumsWithP {
    double p[2] = {};                    // of p and of p^2
    std::vector<double> no_lower, tied;  // (lanes,), of the p of these pairs
};

// What a thread needs, and the sums of one prompt or one piece of it.
template <class T> struct Scratch {
    Index lanes;                                // members, filled up to eights
    T window[2 * chunk_size * 8] = {};          // (responses, 8 members)
    std::uint32_t response_a[chunk_size], response_b[chunk_size];
    std::uint32_t a[chunk_size], b[chunk_size];  // where their rows of the window begin
    double p[chunk_size + 3];
    std::vector<uint64_t> higher, no_lower;     // (chunk_size / 64, lanes), a bit per pair
    SumsWithP with_p;
    Index decided;
    std::vector<Index> votes;                          // (members,), of 64 pairs
    std::vector<Index> tied, halves, majority_halves;  // (members,)
    std::vector<Index> quarters, half_differences;     // (members, members), lower triangle

    explicit Scratch(Index members)
        : lanes((members + 7) / 8 * 8), higher(chunk_size / 64 * lanes), no_lower(higher.size()), votes(members),
          tied(members), halves(members), majority_halves(members), quarters(members * members), half_differences(members * members) {
        restart();
    }

    void restart() {
        decided = 0;
        with_p.p[0] = with_p.p[1] = 0;
        with_p.no_lower.assign(lanes, 0.0);
        with_p.tied.assign(lanes, 0.0);
        for (auto *sums : {&tied, &halves, &majority_halves, &quarters, &half_differences})
            std::fill(sums->begin(), sums->end(), 0);
    }
};

template <class I> INLINE bool narrow(const I *indices, Index count, std::uint32_t *out) {
    I high_bits = 0;
    for (Index i = 0; i < count; ++i) {
        high_bits |= indices[i];
        out[i] = static_cast<std::uint32_t>(indices[i]);
    }
    return high_bits >= 0 && high_bits <= std::numeric_limits<std::int32_t>::max();
}

// Indices from `begin` as 32 bits. False where one does not fit: then it is out of range.
INLINE bool read_indices(const Indices &indices, Index begin, Index count, std::uint32_t *out) {
    const bool fit = indices.wide ? narrow(static_cast<const std::int64_t *>(indices.data) + begin, count, out)
                                  : narrow(static_cast<const std::int32_t *>(indices.data) + begin, count, out);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // or the compiler reads `indices` again in place of `out`
    return fit;
}

// Where the responses of up to chunk_size pairs, from `begin`, will be in the window. False where an index is out of range.
template <class T>
INLINE bool find_rows(const Comparisons<T> &in, Index begin, Index count, Scratch<T> &scratch, Index &low, Index &range) {
    std::uint32_t least = std::numeric_limits<std::uint32_t>::max(), largest = 0;
    for (const auto &[indices, responses] : {std::pair(in.a, scratch.response_a), std::pair(in.b, scratch.response_b)}) {
        if (!read_indices(indices, begin, count, responses)) return false;
        for (Index i = 0; i < count; ++i) {
            least = std::min(least, responses[i]);
            largest = std::max(largest, responses[i]);
        }
    }
    if (largest >= in.responses) return false;
    low = least;
    range = Index{largest} - least + 1;
    if (range > 2 * count) range = 0;  // fewer rewards to fetch pair by pair than all between
    for (Index i = 0; i < count; ++i) {
        scratch.a[i] = range ? 8 * (scratch.response_a[i] - least) : static_cast<std::uint32_t>(16 * i);
        scratch.b[i] = range ? 8 * (scratch.response_b[i] - least) : static_cast<std::uint32_t>(16 * i + 8);
    }
    return true;
}

// The rewards of members [lane, lane + 8) on the chunk's responses, side by side.
template <class T>
INLINE void fill_window(const Comparisons<T> &in, Index count, Index low, Index range, Index lane, Scratch<T> &s) {
    T *window = s.window;
    const Index width = std::min<Index>(8, in.members - lane);
    const T *rewards = in.rewards + lane * in.responses;
    if (range > 0) {
        for (Index j = 0; j < width; ++j)
            for (Index row = 0; row < range; ++row) window[8 * row + j] = rewards[j * in.responses + low + row];
    } else {
        for (Index j = 0; j < width; ++j)
            for (Index i = 0; i < count; ++i) {
                window[16 * i + j] = rewards[j * in.responses + s.response_a[i]];
                window[16 * i + 8 + j] = rewards[j * in.responses + s.response_b[i]];
            }
    }
}

// Adds p to the sums of the lanes whose mask is set. 32-bit masks are doubled within each 128 bits, which is one instruction:
// so the sums of eight lanes lie in the order of `sum_of_lane`.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(mask, ...) __builtin_shufflevector(mask, mask, __VA_ARGS__)
#else
#define SHUFFLE(mask, ...) __builtin_shuffle(mask, Mask{__VA_ARGS__})
#endif
template <class Doubles, class Mask> INLINE void add_masked(Doubles *sums, Mask mask, double p) {
    const Mask fraction = (Mask)(Doubles{} + p);
    if constexpr (sizeof(mask[0]) == 8) {
        *sums += (Doubles)(mask & fraction);
    } else if constexpr (sizeof(mask) == 32) {
        sums[0] += (Doubles)(SHUFFLE(mask, 0, 0, 1, 1, 4, 4, 5, 5) & fraction);
        sums[1] += (Doubles)(SHUFFLE(mask, 2, 2, 3, 3, 6, 6, 7, 7) & fraction);
    } else {
        sums[0] += (Doubles)(SHUFFLE(mask, 0, 0, 1, 1) & fraction);
        sums[1] += (Doubles)(SHUFFLE(mask, 2, 2, 3, 3) & fraction);
    }
}

template <Path path, class T> constexpr int sum_of_lane(int lane) {
    return path != Path::portable && sizeof(T) == 4 ? (lane & 1) | (lane & 4) >> 1 | (lane & 2) << 1 : lane;
}

// Votes of eight members on up to 64 pairs, and their sums with p.
template <Path path, class T>
INLINE void compare(const T *window, const std::uint32_t *a, const std::uint32_t *b, const double *p, Index count,
                    uint64_t *higher_out, uint64_t *no_lower_out, double *no_lower_p, double *p_sums) {
    using Word = std::conditional_t<sizeof(T) == 4, std::uint32_t, uint64_t>;
    using Rewards = typename LanesOf<T, vector_bytes<path>>::type;
    using Words = typename LanesOf<Word, vector_bytes<path>>::type;
    using Doubles = typename LanesOf<double, vector_bytes<path>>::type;
    constexpr Index word_bits = 8 * sizeof(Word);
    constexpr int width = vector_bytes<path> / sizeof(T), parts = 8 / width, sums_in_part = sizeof(double) / sizeof(T);
    double sums_by_lane[8];
    for (int lane = 0; lane < 8; ++lane) sums_by_lane[sum_of_lane<path, T>(lane)] = no_lower_p[lane];
    Doubles sums[parts * sums_in_part];
    std::memcpy(sums, sums_by_lane, sizeof sums);
    double sum = p_sums[0], sum_of_squares = p_sums[1];
    std::fill_n(higher_out, 8, 0);
    std::fill_n(no_lower_out, 8, 0);
    for (Index begin = 0; begin < count; begin += word_bits) {
        Words higher[parts] = {}, no_lower[parts] = {}, bit = Words{} + 1;
        for (Index i = begin; i < std::min(count, begin + word_bits); ++i) {
            sum += p[i];
            sum_of_squares += p[i] * p[i];
            for (int part = 0; part < parts; ++part) {
                Rewards on_a, on_b;
                std::memcpy(&on_a, window + a[i] + width * part, sizeof on_a);
                std::memcpy(&on_b, window + b[i] + width * part, sizeof on_b);
                const Words is_no_lower = (Words)(on_a >= on_b);  // 0, or all bits
                higher[part] |= (Words)(on_a > on_b) & bit;
                no_lower[part] |= is_no_lower & bit;
                add_masked(sums + part * sums_in_part, is_no_lower, p[i]);
            }
            bit += bit;
        }
        for (int lane = 0; lane < 8; ++lane) {
            higher_out[lane] |= uint64_t{higher[lane / width][lane % width]} << begin;
            no_lower_out[lane] |= uint64_t{no_lower[lane / width][lane % width]} << begin;
        }
    }
    std::memcpy(sums_by_lane, sums, sizeof sums);
    for (int lane = 0; lane < 8; ++lane) no_lower_p[lane] = sums_by_lane[sum_of_lane<path, T>(lane)];
    p_sums[0] = sum;
    p_sums[1] = sum_of_squares;
}

#if HAS_X86_CODE
template <int comparison> AVX512 inline __mmask8 compare_eight(const float *x, const float *y) {
    return _mm256_cmp_ps_mask(_mm256_loadu_ps(x), _mm256_loadu_ps(y), comparison);
}
template <int comparison> AVX512 inline __mmask8 compare_eight(const double *x, const double *y) {
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(x), _mm512_loadu_pd(y), comparison);
}

// The same with AVX-512: a comparison gives a byte with a bit for each member, and sums add under it.
template <class T>
AVX512 void compare_avx512(const T *window, const std::uint32_t *a, const std::uint32_t *b, const double *p, Index count,
                           uint64_t *higher_out, uint64_t *no_lower_out, double *no_lower_p, double *p_sums) {
    unsigned char higher[64] = {}, no_lower[64] = {};
    __m512d sums = _mm512_loadu_pd(no_lower_p);
    double sum = p_sums[0], sum_of_squares = p_sums[1];
    for (Index i = 0; i < count; ++i) {
        sum += p[i];
        sum_of_squares += p[i] * p[i];
        const __mmask8 is_no_lower = compare_eight<_CMP_GE_OQ>(window + a[i], window + b[i]);
        higher[i] = compare_eight<_CMP_GT_OQ>(window + a[i], window + b[i]);
        no_lower[i] = is_no_lower;
        sums = _mm512_mask_add_pd(sums, is_no_lower, sums, _mm512_set1_pd(p[i]));
    }
    for (int lane = 0; lane < 8; ++lane) {
        const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << lane));
        higher_out[lane] = _mm512_test_epi8_mask(_mm512_loadu_si512(higher), bit);
        no_lower_out[lane] = _mm512_test_epi8_mask(_mm512_loadu_si512(no_lower), bit);
    }
    _mm512_storeu_pd(no_lower_p, sums);
    p_sums[0] = sum;
    p_sums[1] = sum_of_squares;
}
#endif

template <Path path, class T, class... Arguments> INLINE void compare_on(Arguments... arguments) {
#if HAS_X86_CODE
    if constexpr (path == Path::avx512) return compare_avx512<T>(arguments...);
#endif
    return compare<path, T>(arguments...);
}

// Bits of up to 64 fractions: is there a majority, and is it for a? False where one is outside [0, 1], or NaN.
template <Path path> INLINE bool find_majorities(const double *p, Index count, uint64_t &decided, uint64_t &to_a) {
    using Doubles = typename LanesOf<double, vector_bytes<path>>::type;
    using Masks = typename LanesOf<uint64_t, vector_bytes<path>>::type;
    constexpr int width = vector_bytes<path> / 8;
    Masks is_decided = {}, is_to_a = {}, is_valid = ~Masks{}, bits;
    for (int lane = 0; lane < width; ++lane) bits[lane] = 1u << lane;
    for (Index i = 0; i < count; i += width) {
        Doubles fractions;
        std::memcpy(&fractions, p + i, sizeof fractions);
        is_decided |= (Masks)(fractions != 0.5) & bits;
        is_to_a |= (Masks)(fractions > 0.5) & bits;
        is_valid &= (Masks)(fractions >= 0.0) & (Masks)(fractions <= 1.0);
        bits <<= width;
    }
    decided = to_a = 0;
    bool valid = true;
    for (int lane = 0; lane < width; ++lane) {
        decided |= is_decided[lane];
        to_a |= is_to_a[lane];
        valid &= is_valid[lane] != 0;
    }
    return valid;
}

// Exact counts of up to 64 pairs, and the tied ones' sums with p.
template <Path path, class T>
INLINE void count(Scratch<T> &s, Index members, const double *p, const uint64_t *higher, const uint64_t *no_lower,
                  uint64_t decided, uint64_t to_a) {
    const auto bits = [](uint64_t word) { return path == Path::portable ? popcount(word) : Index{__builtin_popcountll(word)}; };
    s.decided += bits(decided);
    bool ties = false;
    for (Index j = 0; j < members; ++j) ties |= higher[j] != no_lower[j];
    if (!ties) {  // 0 or 1 everywhere: |V_i - V_j| = V_i + V_j - 2 V_i V_j
        for (Index j = 0; j < members; ++j) {
            const Index votes = s.votes[j] = bits(higher[j]);
            s.halves[j] += 2 * votes;
            s.majority_halves[j] += 2 * bits(decided & ~(higher[j] ^ to_a));
            for (Index i = 0; i <= j; ++i) {
                const Index both = bits(higher[i] & higher[j]);
                s.quarters[j * members + i] += 4 * both;
                s.half_differences[j * members + i] += 2 * (s.votes[i] + votes - 2 * both);
            }
        }
        return;
    }
    for (Index j = 0; j < members; ++j) {
        for (uint64_t tied = higher[j] ^ no_lower[j]; tied; tied &= tied - 1) {
            ++s.tied[j];
            s.with_p.tied[j] += p[__builtin_ctzll(tied)];
        }
        s.halves[j] += bits(higher[j]) + bits(no_lower[j]);
        s.majority_halves[j] += bits(decided & ~(higher[j] ^ to_a)) + bits(decided & ~(no_lower[j] ^ to_a));
        for (Index i = 0; i <= j; ++i) {
            s.quarters[j * members + i] += bits(higher[i] & higher[j]) + bits(higher[i] & no_lower[j]) +
                                           bits(no_lower[i] & higher[j]) + bits(no_lower[i] & no_lower[j]);
            s.half_differences[j * members + i] += bits(higher[i] ^ higher[j]) + bits(no_lower[i] ^ no_lower[j]);
        }
    }
}

// Pairs [begin, end). False where an index or a fraction is out of range.
template <Path path, class T>
INLINE bool add(const Comparisons<T> &in, const double *p, Index begin, Index end, Scratch<T> &s) {
    for (; begin < end; begin += chunk_size) {
        const Index count_here = std::min(chunk_size, end - begin);
        Index low, range;
        if (!find_rows(in, begin, count_here, s, low, range)) return false;
        std::copy_n(p + begin, count_here, s.p);
        std::fill_n(s.p + count_here, 3, 0.5);  // they are looked at in twos or fours
        for (Index lane = 0; lane < s.lanes; lane += 8) {
            fill_window(in, count_here, low, range, lane, s);
            double other_sums[2] = {};  // p is summed with the first eight members alone
            for (Index i = 0; i < count_here; i += 64)
                compare_on<path, T>(s.window, s.a + i, s.b + i, s.p + i, std::min<Index>(64, count_here - i),
                              &s.higher[i / 64 * s.lanes + lane], &s.no_lower[i / 64 * s.lanes + lane],
                              &s.with_p.no_lower[lane], lane == 0 ? s.with_p.p : other_sums);
        }
        for (Index i = 0; i < count_here; i += 64) {
            for (Index pair = 0; pair < 64; pair += 8) {  // of the next chunk
                const Index ahead = std::min(begin + chunk_size + i + pair, in.pairs - 1);
                __builtin_prefetch(p + ahead);
                in.a.prefetch(ahead);
                in.b.prefetch(ahead);
            }
            uint64_t decided, to_a;
            if (!find_majorities<path>(s.p + i, std::min<Index>(64, count_here - i), decided, to_a)) return false;
            count<path>(s, in.members, s.p + i, &s.higher[i / 64 * s.lanes], &s.no_lower[i / 64 * s.lanes], decided, to_a);
        }
    }
    return true;
}

template <class T>
bool add_pairs_portable(const Comparisons<T> &in, const double *p, Index begin, Index end, Scratch<T> &s) {
    return add<Path::portable>(in, p, begin, end, s);
}
#if HAS_X86_CODE
template <class T>
AVX2 bool add_pairs_avx2(const Comparisons<T> &in, const double *p, Index begin, Index end, Scratch<T> &s) {
    return add<Path::avx2>(in, p, begin, end, s);
}
template <class T>
AVX512 bool add_pairs_avx512(const Comparisons<T> &in, const double *p, Index begin, Index end, Scratch<T> &s) {
    return add<Path::avx512>(in, p, begin, end, s);
}
#endif

// Whole prompts, or a piece of one.
struct Piece {
    Index first_prompt, last_prompt;  // the last is not one of them
    Index begin, end;                 // pairs
};

std::vector<Piece> cut(const Index *start, Index prompts) {
    std::vector<Piece> pieces;
    for (Index prompt = 0; prompt < prompts;) {
        const Index first = prompt;
        if (start[first + 1] - start[first] > piece_size) {
            ++prompt;
            for (Index begin = start[first]; begin < start[prompt]; begin += piece_size)
                pieces.push_back({first, prompt, begin, std::min(begin + piece_size, start[prompt])});
        } else {
            while (prompt < prompts && start[prompt + 1] - start[first] <= piece_size) ++prompt;
            pieces.push_back({first, prompt, start[first], start[prompt]});
        }
    }
    return pieces;
}

template <class T> void put(T *to, T value, bool add) { *to = add ? *to + value : value; }

// What is exact: halves and quarters of integers too, so the order in which pieces are added doesn't matter.
template <class T>
void write_counts(const Scratch<T> &s, Index members, Index prompt, Index pairs, bool add, const PairSums &out) {
    put(out.pairs + prompt, pairs, add);
    put(out.decided + prompt, s.decided, add);
    for (Index j = 0; j < members; ++j) {
        const Index row = prompt * members + j;
        put(out.ties + row, s.tied[j], add);
        put(out.vote + row, 0.5 * s.halves[j], add);
        put(out.majority + row, 0.5 * s.majority_halves[j], add);
        for (Index i = 0; i < members; ++i) {
            const Index lower = std::max(i, j) * members + std::min(i, j);  // only the lower triangle was counted
            put(out.vote_vote + row * members + i, 0.25 * s.quarters[lower], add);
            put(out.disagreement + row * members + i, 0.5 * s.half_differences[lower], add);
        }
    }
}

void write_sums_with_p(const SumsWithP &s, Index members, Index prompt, bool add, const PairSums &out) {
    put(out.p + prompt, s.p[0], add);
    put(out.p_p + prompt, s.p[1], add);
    for (Index j = 0; j < members; ++j) put(out.vote_p + prompt * members + j, s.no_lower[j] - 0.5 * s.tied[j], add);
}

}  // namespace

template <class T> Index find_nan(const T *values, Index count, Index threads) {
    constexpr Index block = 1 << 16;
    std::atomic<bool> found{false};
    run_parallel((count + block - 1) / block, count_threads(threads, 0.3 * count), [&](Queue &queue) {
        for (Index item; queue.take(item);) {
            const Index begin = item * block, end = std::min(count, begin + block);
            int nan = 0;
            for (Index i = begin; i < end; ++i) nan |= values[i] != values[i];
            if (nan) found = true;
        }
    });
    if (!found) return -1;
    return std::find_if(values, values + count, [](T value) { return std::isnan(value); }) - values;
}

template <class T> bool all_votes(const Comparisons<T> &in, std::uint8_t *out) {
    const IeeeArithmetic arithmetic;
    std::uint32_t a[chunk_size], b[chunk_size];
    for (Index begin = 0; begin < in.pairs; begin += chunk_size) {
        const Index count = std::min(chunk_size, in.pairs - begin);
        if (!read_indices(in.a, begin, count, a) || !read_indices(in.b, begin, count, b)) return false;
        if (std::max(*std::max_element(a, a + count), *std::max_element(b, b + count)) >= in.responses) return false;
        for (Index member = 0; member < in.members; ++member) {
            const T *reward = in.rewards + member * in.responses;
            std::uint8_t *votes = out + member * in.pairs + begin;
            for (Index i = 0; i < count; ++i) {
                const T on_a = reward[a[i]], on_b = reward[b[i]];
                votes[i] = static_cast<std::uint8_t>((on_a > on_b) + (on_a >= on_b));
            }
        }
    }
    return true;
}

template <class T>
bool sum_pairs(const Comparisons<T> &in, const double *p, const Index *start, Index prompts, Path path, Index threads,
               const PairSums &out) {
    const IeeeArithmetic arithmetic;
    const auto pieces = cut(start, prompts);
    const auto is_part = [&](const Piece &piece) {
        return piece.end - piece.begin < start[piece.last_prompt] - start[piece.first_prompt];
    };
    std::vector<SumsWithP> parts(pieces.size());
    for (const Piece &piece : pieces)
        if (is_part(piece)) write_counts(Scratch<T>(in.members), in.members, piece.first_prompt, 0, false, out);

    auto add_pairs = add_pairs_portable<T>;
    if (path == Path::automatic) path = fastest_path();
#if HAS_X86_CODE
    if (path == Path::avx512) add_pairs = add_pairs_avx512<T>;
    if (path == Path::avx2) add_pairs = add_pairs_avx2<T>;
#endif
    std::atomic<bool> valid{true};
    std::mutex row_mutex;
    const double nanoseconds = 0.5 * in.pairs * in.members + 0.5 * prompts * in.members * in.members;
    run_parallel(static_cast<Index>(pieces.size()), count_threads(threads, nanoseconds), [&](Queue &queue) {
        Scratch<T> s(in.members);
        for (Index item; valid && queue.take(item);) {
            const Piece &piece = pieces[item];
            if (is_part(piece)) {
                s.restart();
                if (!add_pairs(in, p, piece.begin, piece.end, s)) valid = false;
                parts[item] = s.with_p;
                const std::lock_guard<std::mutex> lock(row_mutex);
                write_counts(s, in.members, piece.first_prompt, piece.end - piece.begin, true, out);
                continue;
            }
            for (Index prompt = piece.first_prompt; prompt < piece.last_prompt; ++prompt) {
                s.restart();
                if (!add_pairs(in, p, start[prompt], start[prompt + 1], s)) valid = false;
                write_counts(s, in.members, prompt, start[prompt + 1] - start[prompt], false, out);
                write_sums_with_p(s.with_p, in.members, prompt, false, out);
            }
        }
    });
    for (std::size_t i = 0; valid && i < pieces.size(); ++i) {
        const Index prompt = pieces[i].first_prompt;
        if (is_part(pieces[i])) write_sums_with_p(parts[i], in.members, prompt, pieces[i].begin > start[prompt], out);
    }
    return valid;
}

template Index find_nan(const float *, Index, Index);
template Index find_nan(const double *, Index, Index);
template bool all_votes(const Comparisons<float> &, std::uint8_t *);
template bool all_votes(const Comparisons<double> &, std::uint8_t *);
template bool sum_pairs(const Comparisons<float> &, const double *, const Index *, Index, Path, Index, const PairSums &);
template bool sum_pairs(const Comparisons<double> &, const double *, const Index *, Index, Path, Index, const PairSums &);
