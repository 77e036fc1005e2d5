// Two ways to count discordant and tied pairs, both in exact integers: by sorting, O(n log n), and by comparing all pairs,
// O(n^2), but 32 pairs of continuations at a time and, once compared, 64 at a time for every two models. Cost decides.

#include "evaluator.hpp"

#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>

#if HAS_X86_CODE
#include <immintrin.h>
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header brings it up
#endif

namespace {

using std::uint32_t;
using std::uint64_t;

// Pairs of continuations, counted for every two models of one prompt. Only i > j is filled.
struct Counts {
    std::vector<Index> tied;          // (models,), equal scores
    std::vector<Index> tied_in_both;  // (models, models)
    std::vector<Index> discordant;    // (models, models), strictly opposite
    explicit Counts(Index models) : tied(models), tied_in_both(models * models), discordant(models * models) {}
};

// ---- O(n log n): sort once per model, then count inversions per pair of models (Knight 1966) ----

template <class T> using KeyOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// An unsigned integer in the order of the scores.
template <class T> KeyOf<T> key_of(const T &at) {
    T score;
    __atomic_load(&at, &score, __ATOMIC_RELAXED);  // once: the sort relies on a key that stays
    score += T(0);  // -0.0, which equals 0.0, becomes 0.0
    KeyOf<T> bits;
    std::memcpy(&bits, &score, sizeof bits);
    const auto sign = KeyOf<T>{1} << (8 * sizeof bits - 1);
    return bits & sign ? ~bits : bits | sign;
}

template <class T> struct SortScratch {
    struct Entry {
        KeyOf<T> key;
        uint32_t item;
    };
    std::vector<Entry> entries, buffer;
};

// One model's ranking of the n continuations of one prompt.
struct Ranking {
    std::vector<uint32_t> order;  // continuations by increasing score
    std::vector<uint32_t> group;  // of each continuation: where those with the same score begin in `order`
    Index tied_pairs;

    // Radix sort, a byte at a time.
    template <class T> void assign(const T *scores, Index n, SortScratch<T> &scratch) {
        uint32_t counts[sizeof(T)][256] = {};
        auto &entries = scratch.entries, &buffer = scratch.buffer;
        entries.resize(n);
        buffer.resize(n);
        for (Index i = 0; i < n; ++i) {
            entries[i] = {key_of(scores[i]), static_cast<uint32_t>(i)};
            for (unsigned byte = 0; byte < sizeof(T); ++byte) ++counts[byte][entries[i].key >> 8 * byte & 255];
        }
        for (unsigned byte = 0; byte < sizeof(T) && n > 0; ++byte) {
            if (counts[byte][entries[0].key >> 8 * byte & 255] == n) continue;  // all alike here
            uint32_t begin = 0, starts[256];
            for (int value = 0; value < 256; ++value) {
                starts[value] = begin;
                begin += counts[byte][value];
            }
            for (const auto &entry : entries) buffer[starts[entry.key >> 8 * byte & 255]++] = entry;
            entries.swap(buffer);
        }
        order.resize(n);
        group.resize(n);
        tied_pairs = 0;
        uint32_t begin = 0;
        for (Index i = 0; i < n; ++i) {
            if (i > 0 && entries[i].key != entries[i - 1].key) begin = static_cast<uint32_t>(i);
            order[i] = entries[i].item;
            group[order[i]] = begin;
            tied_pairs += i - begin;
        }
    }
};

struct PairScratch {
    std::vector<uint32_t> next, sorted, values, buffer, high;
};

// Pairs out of order in a permutation of 0 .. n - 1, which is lost. From the highest bit down: a value with the bit before
// one of the same block without it is an inversion; once counted, those without go to the block's first half, in order.
// As all values occur once, a block of values is a block of places. At last 64 values fit one word.
Index count_inversions(std::vector<uint32_t> &values, std::vector<uint32_t> &buffer, std::vector<uint32_t> &high) {
    const Index n = static_cast<Index>(values.size());
    Index inversions = 0;
    int bit = 5;
    while (Index{2} << bit < n) ++bit;
    buffer.resize(n + 1);
    high.resize((Index{1} << bit) + 1);
    for (; bit > 5; --bit) {
        const Index half = Index{1} << bit;
        for (Index begin = 0; begin < n; begin += 2 * half) {
            const uint32_t *in = values.data() + begin;
            uint32_t *out = buffer.data() + begin;
            const Index length = std::min(2 * half, n - begin);
            Index set = 0, places = 0;
            for (Index i = 0; i < length; ++i) {  // no branch, which would be a coin flip: one of the two is overwritten
                const Index is_set = in[i] >> bit & 1;
                out[i - set] = high[set] = in[i];
                places += i & -is_set;
                set += is_set;
            }
            std::copy_n(high.data(), set, out + length - set);
            // The r-th with the bit set has place - r without it before it, and the others behind it.
            inversions += set * (length - set) - (places - set * (set - 1) / 2);
        }
        values.swap(buffer);
    }
    for (Index begin = 0; begin < n; begin += 64) {
        const Index end = std::min(begin + 64, n);
        uint64_t seen = 0;
        for (Index i = begin; i < end; ++i) {
            inversions += popcount(seen >> (values[i] & 63));
            seen |= uint64_t{1} << (values[i] & 63);
        }
    }
    return inversions;
}

// Ties are no inversions: continuations are taken by (x, y), and each one's value is its place by (y, x).
void count_pair(const Ranking &x, const Ranking &y, PairScratch &scratch, Index &tied_in_both, Index &discordant) {
    const Index n = static_cast<Index>(x.order.size());
    const std::vector<uint32_t> *sorted = &x.order;
    scratch.next.resize(n);
    if (x.tied_pairs > 0) {  // y's order dealt into x's groups
        std::iota(scratch.next.begin(), scratch.next.end(), 0u);
        scratch.sorted.resize(n);
        for (const uint32_t item : y.order) scratch.sorted[scratch.next[x.group[item]]++] = item;
        sorted = &scratch.sorted;
    }
    scratch.values.resize(n);
    if (y.tied_pairs > 0) {
        std::iota(scratch.next.begin(), scratch.next.end(), 0u);
        for (Index i = 0; i < n; ++i) scratch.values[i] = scratch.next[y.group[(*sorted)[i]]]++;
    } else {
        for (Index i = 0; i < n; ++i) scratch.values[i] = y.group[(*sorted)[i]];
    }
    tied_in_both = 0;
    if (x.tied_pairs > 0 && y.tied_pairs > 0) {
        Index run = 0;
        for (Index i = 1; i < n; ++i) {
            const uint32_t item = (*sorted)[i], before = (*sorted)[i - 1];
            run = x.group[item] == x.group[before] && y.group[item] == y.group[before] ? run + 1 : 0;
            tied_in_both += run;
        }
    }
    discordant = count_inversions(scratch.values, scratch.buffer, scratch.high);
}

template <class T> class CountBySorting {
    const Index models, prompts, n, threads;
    std::vector<Ranking> rankings;

public:
    CountBySorting(Index models, Index prompts, Index n, Index threads)
        : models(models), prompts(prompts), n(n), threads(threads), rankings(models) {}

    void operator()(const T *scores, Index prompt, Counts &counts) {
        run_parallel(models, threads, [&](Queue &queue) {
            SortScratch<T> scratch;
            for (Index i; queue.take(i);) {
                rankings[i].assign(scores + (i * prompts + prompt) * n, n, scratch);
                counts.tied[i] = rankings[i].tied_pairs;
            }
        });
        run_parallel(models * models, threads, [&](Queue &queue) {
            PairScratch scratch;
            for (Index pair; queue.take(pair);)
                if (const Index i = pair / models, j = pair % models; j < i)
                    count_pair(rankings[i], rankings[j], scratch, counts.tied_in_both[pair], counts.discordant[pair]);
        });
    }
};

// ---- O(n^2): all pairs of continuations as bits ----

#if HAS_X86_CODE

struct EightDoubles { __m256d low, high; };

AVX2 inline __m256 load(const float *scores) { return _mm256_loadu_ps(scores); }
AVX2 inline EightDoubles load(const double *scores) { return {_mm256_loadu_pd(scores), _mm256_loadu_pd(scores + 4)}; }

template <int comparison> AVX2 inline __m256i compare(const __m256 &x, const __m256 &y) {
    return _mm256_castps_si256(_mm256_cmp_ps(x, y, comparison));
}
template <int comparison> AVX2 inline __m256i compare(const EightDoubles &x, const EightDoubles &y) {
    const __m256 low = _mm256_castpd_ps(_mm256_cmp_pd(x.low, y.low, comparison));
    const __m256 high = _mm256_castpd_ps(_mm256_cmp_pd(x.high, y.high, comparison));
    // half of each mask is enough; the permutation undoes the shuffle's mixing of the two
    return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0))),
                                    _MM_SHUFFLE(3, 1, 2, 0));
}

// The pairs of n continuations are (i, i + shift mod n) for shifts up to n / 2. A word of 32 bits has 8 columns i and 4
// shifts; words lie column by column. This is the place of a bit in its word, as the packing below leaves it.
constexpr Index column_of(int bit) { return 4 * (bit / 16) + bit % 4; }
constexpr Index shift_of(int bit) { return bit % 16 / 4; }

// Bits of the comparison of x[i] with x[i + shift] in words of columns [begin, end); is any of their pairs tied?
template <int comparison, class T>
AVX2 bool pack(const T *cyclic, Index begin, Index end, Index groups, const uint32_t *valid, uint32_t *words) {
    __m256i ties = _mm256_setzero_si256();
    for (Index column = begin; column < end; ++column) {
        const auto x = load(cyclic + 8 * column);
        for (Index group = 0; group < groups; ++group) {
            __m256i bits[4];
            for (int shift = 0; shift < 4; ++shift) {
                const auto y = load(cyclic + 8 * column + 4 * group + shift + 1);
                bits[shift] = compare<comparison>(x, y);
                ties = _mm256_or_si256(ties, compare<_CMP_EQ_OQ>(x, y));
            }
            const __m256i packed =
                _mm256_packs_epi16(_mm256_packs_epi32(bits[0], bits[1]), _mm256_packs_epi32(bits[2], bits[3]));
            *words++ = static_cast<uint32_t>(_mm256_movemask_epi8(packed)) & *valid++;
        }
    }
    return !_mm256_testz_si256(ties, ties);
}

inline uint64_t two_words(const uint32_t *words) {
    uint64_t both;
    std::memcpy(&both, words, sizeof both);
    return both;
}

AVX2 inline Index count_differences(const uint32_t *x, const uint32_t *y, Index words) {
    Index differences = 0;
#pragma GCC unroll 4
    for (Index w = 0; w < words; w += 2) differences += __builtin_popcountll(two_words(x + w) ^ two_words(y + w));
    return differences;
}

template <class T> class CountAllPairs {
    const Index models, prompts, n;
    const Index columns, groups;      // of 8 continuations, of 4 shifts
    const Index tile;                 // columns at a time, so that the words of a few models stay in the first-level cache
    const Index stride;               // words of a tile, made even: they are counted in twos
    const Index cyclic_length;
    std::vector<uint32_t> valid;      // (columns, groups), the bits that are a pair, each pair once
    std::vector<T> cyclic;            // (models, cyclic_length), the scores, over and over
    std::vector<uint32_t> less, tie;  // (models, stride), of a tile

public:
    CountAllPairs(Index models, Index prompts, Index n)
        : models(models), prompts(prompts), n(n), columns((n + 7) / 8), groups((n / 2 + 3) / 4),
          tile(std::clamp<Index>(1024 / (groups + 1), 1, columns + 1)), stride((tile * groups + 1) / 2 * 2),
          cyclic_length(8 * columns + 4 * groups), valid(columns * groups), cyclic(models * cyclic_length),
          less(models * stride), tie(models * stride) {
        for (Index word = 0; word < columns * groups; ++word) {
            const bool inside = word / groups < columns - 1 && word % groups < groups - 1;
            for (int bit = 0; bit < 32 && !inside; ++bit) {
                const Index column = 8 * (word / groups) + column_of(bit), shift = 4 * (word % groups) + shift_of(bit) + 1;
                // n / 2, for an even n, is also its own opposite: half of its columns are the same pairs again
                if (column < n && (2 * shift < n || (2 * shift == n && 2 * column < n))) valid[word] |= 1u << bit;
            }
            if (inside) valid[word] = ~0u;
        }
    }

    AVX2 void operator()(const T *scores, Index prompt, Counts &counts) {
        if (n < 2) return;
        for (Index j = 0; j < models; ++j)
            for (Index done = 0; done < cyclic_length; done += n)
                std::copy_n(scores + (j * prompts + prompt) * n, std::min(n, cyclic_length - done),
                            &cyclic[j * cyclic_length + done]);
        for (Index begin = 0; begin < columns; begin += tile) {
            const Index end = std::min(begin + tile, columns), words = ((end - begin) * groups + 1) / 2 * 2;
            const bool ties = pack_models<_CMP_LT_OQ>(begin, end, words, less);
            if (ties) pack_models<_CMP_EQ_OQ>(begin, end, words, tie);
            for (Index i = 0; i < models; ++i)
                for (Index j = 0; j < i + (ties ? 1 : 0); ++j) {  // with itself, a model has its own ties in common
                    const Index pair = i * models + j;
                    const uint32_t *x = &less[i * stride], *y = &less[j * stride];
                    if (!ties) {
                        counts.discordant[pair] += count_differences(x, y, words);
                        continue;
                    }
                    const uint32_t *tie_x = &tie[i * stride], *tie_y = &tie[j * stride];
                    Index tied = 0;
                    for (Index w = 0; w < words; w += 2) {
                        const uint64_t in_x = two_words(tie_x + w), in_y = two_words(tie_y + w);
                        tied += __builtin_popcountll(in_x & in_y);
                        counts.discordant[pair] +=
                            __builtin_popcountll((two_words(x + w) ^ two_words(y + w)) & ~(in_x | in_y));
                    }
                    (i == j ? counts.tied[i] : counts.tied_in_both[pair]) += tied;
                }
        }
    }

private:
    template <int comparison> AVX2 bool pack_models(Index begin, Index end, Index words, std::vector<uint32_t> &packed) {
        bool ties = false;
        for (Index j = 0; j < models; ++j) {
            packed[j * stride + words - 1] = 0;  // stays so where the words are odd in number
            ties |= pack<comparison>(&cyclic[j * cyclic_length], begin, end, groups, &valid[begin * groups],
                                     &packed[j * stride]);
        }
        return ties;
    }
};

// The same with AVX-512: a block y of 16 or 8 continuations is compared with four others or one, or with itself turned, which
// gives two masks: is y less, and is it untied? Unaligned loads, each across two cache lines, would take half as long again.
template <class Mask> struct Compared { Mask less, untied; };

AVX512 inline __m512 columns_at(const float *scores, Index count) {
    const __m512 found = count < 16 ? _mm512_maskz_loadu_ps((1 << count) - 1, scores) : _mm512_loadu_ps(scores);
    return _mm512_add_ps(found, _mm512_setzero_ps());  // -0.0, which equals 0.0, becomes 0.0
}
AVX512 inline __m512d columns_at(const double *scores, Index count) {
    return count < 8 ? _mm512_maskz_loadu_pd((1 << count) - 1, scores) : _mm512_loadu_pd(scores);
}
AVX512 inline __m512 all_columns(float score) { return _mm512_set1_ps(score); }
AVX512 inline __m512d all_columns(double score) { return _mm512_set1_pd(score); }
AVX512 inline __m512 turned(const __m512 &y) {
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(y), _mm512_castps_si512(y), 1));
}
AVX512 inline __m512d turned(const __m512d &y) {
    return _mm512_castsi512_pd(_mm512_alignr_epi64(_mm512_castpd_si512(y), _mm512_castpd_si512(y), 1));
}
// Of finite scores: the sign of y - x says whether y is less, and its bits, whether it is untied. Both stay when four differences
// are made 8 bits each, since these saturate: so the two ports of the CPU that take such instructions have the fewest.
AVX512 inline Compared<uint64_t> compare(const __m512 &y, const __m512 *x) {
    __m512i bits[4];
    for (int step = 0; step < 4; ++step) bits[step] = _mm512_castps_si512(_mm512_sub_ps(y, x[step]));
    const __m512i all = _mm512_packs_epi16(_mm512_packs_epi32(bits[0], bits[1]), _mm512_packs_epi32(bits[2], bits[3]));
    return {_mm512_movepi8_mask(all), _mm512_test_epi8_mask(all, all)};
}
AVX512 inline Compared<uint8_t> compare(const __m512d &y, const __m512d *x) {
    return {_mm512_cmp_pd_mask(y, *x, _CMP_LT_OQ), _mm512_cmp_pd_mask(y, *x, _CMP_NEQ_OQ)};
}
AVX512 inline __mmask16 incomparable(const __m512 &y) { return _mm512_fpclass_ps_mask(y, 0x18); }  // infinite ones
AVX512 inline __mmask16 incomparable(const __m512d &) { return 0; }

template <class T> class CountMasks {
    using Mask = std::conditional_t<sizeof(T) == 4, uint64_t, uint8_t>;
    static constexpr Index lanes = 64 / sizeof(T), steps = 8 * sizeof(Mask) / lanes, masks_of_word = 64 / sizeof(Mask);
    struct alignas(64) Word { Mask masks[masks_of_word]; };
    const Index models, prompts, n;
    const Index tile;                // columns at a time, so that the masks of a few models stay in the first-level cache
    const Index room;                // words for their masks
    std::vector<Word> less, untied;  // (models, room)
    std::vector<Index> own;          // (models,), untied pairs of a tile
    Mask whole[lanes / 2 / steps] = {}, partial[lanes / 2 / steps] = {};  // pairs in a block, each once, and in the last, partial one

public:
    CountMasks(Index models, Index prompts, Index n)
        : models(models), prompts(prompts), n(n), tile(std::clamp<Index>(2048 / (n + 1), 1, n / lanes + 1) * lanes),
          room(tile / lanes * n / steps / masks_of_word + 1), less(models * room), untied(models * room), own(models) {
        for (Index shift = 0; shift < lanes / 2; ++shift)
            for (Index lane = 0; lane < lanes; ++lane) {
                const Index other = (lane + shift + 1) % lanes, bit = lane / 4 * 4 * steps + shift % steps * 4 + lane % 4;
                const Mask pair = other == lane + lanes / 2 || shift < lanes / 2 - 1 ? Mask{1} << bit : 0;
                whole[shift / steps] |= pair;
                if (std::max(lane, other) < n % lanes) partial[shift / steps] |= pair;
            }
    }

    AVX512 void operator()(const T *scores, Index prompt, Counts &counts) {
        for (Index begin = 0; begin + 1 < n; begin += tile) {
            const Index end = std::min(begin + tile, n - 1);
            Index words = 0;
            for (Index j = 0; j < models; ++j) {
                words = pack(scores + (j * prompts + prompt) * n, begin, end, less[j * room].masks, untied[j * room].masks);
                if (words == 0) {
                    counts = Counts(models);
                    return CountAllPairs<T>(models, prompts, n)(scores, prompt, counts);
                }
            }
            const Index last = std::min(begin + tile, n), pairs = (last - begin) * (2 * n - 1 - begin - last) / 2;
            for (Index i = 0; i < models; ++i) {
                own[i] = count_untied(i, words);
                counts.tied_in_both[i * models + i] += own[i];
                for (Index j = 0; j < i; ++j)
                    if (own[i] < pairs && own[j] < pairs) count_pair(i, j, words, counts);
                    else count_pair_without_ties(i, j, own[i] < pairs ? i : j, words, counts);
            }
        }
        for (Index i = 0; i < models; ++i) {  // from untied in both to tied in both; with itself a model has all in common
            const Index *untied = counts.tied_in_both.data();
            counts.tied[i] = n * (n - 1) / 2 - untied[i * models + i];
            for (Index j = 0; j < i; ++j) counts.tied_in_both[i * models + j] += counts.tied[i] - untied[j * models + j];
        }
    }

private:
    // Fills the words and returns how many; 0 where scores are infinite, which `compare` cannot do.
    AVX512 Index pack(const T *row, Index begin, Index end, Mask *less, Mask *untied) const {
        Index masks = 0;
        __mmask16 infinite = 0;
        for (Index column = begin; column < end; column += lanes) {
            const auto y = columns_at(row + column, n - column);
            infinite |= incomparable(y);
            auto x = y;  // the pairs within the block
            decltype(x) others[steps];
            const Mask *valid = column + lanes <= n ? whole : partial;
            for (Index group = 0; group < lanes / 2 / steps; ++group, ++masks) {
                for (auto &other : others) other = x = turned(x);
                const auto found = compare(y, others);
                less[masks] = found.less & valid[group];
                untied[masks] = found.untied & valid[group];
            }
            for (Index i = column + lanes; i < n; i += steps, ++masks) {
                for (Index step = 0; step < steps; ++step) others[step] = i + step < n ? all_columns(row[i + step]) : y;
                const auto found = compare(y, others);
                less[masks] = found.less;
                untied[masks] = found.untied;
            }
        }
        for (; masks % masks_of_word != 0; ++masks) less[masks] = untied[masks] = 0;
        return infinite ? 0 : masks / masks_of_word;
    }

    AVX512 Index count_untied(Index i, Index words) const {
        __m512i sum = _mm512_setzero_si512();
        for (Index w = 0; w < words; ++w) sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_load_si512(&untied[i * room + w])));
        return _mm512_reduce_add_epi64(sum);
    }

    // Where all is untied in one of two, `tied` is the other.
    AVX512 void count_pair_without_ties(Index i, Index j, Index tied, Index words, Counts &counts) const {
        const Word *less_i = &less[i * room], *less_j = &less[j * room], *both = &untied[tied * room];
        __m512i discordant = _mm512_setzero_si512();
        for (Index w = 0; w < words; ++w) {
            const __m512i less_in_one = _mm512_xor_si512(_mm512_load_si512(less_i + w), _mm512_load_si512(less_j + w));
            discordant = _mm512_add_epi64(discordant,
                                          _mm512_popcnt_epi64(_mm512_and_si512(less_in_one, _mm512_load_si512(both + w))));
        }
        counts.discordant[i * models + j] += _mm512_reduce_add_epi64(discordant);
        counts.tied_in_both[i * models + j] += own[tied];
    }

    // Adds to tied_in_both what is untied in both.
    AVX512 void count_pair(Index i, Index j, Index words, Counts &counts) const {
        const Word *less_i = &less[i * room], *less_j = &less[j * room];
        const Word *untied_i = &untied[i * room], *untied_j = &untied[j * room];
        __m512i discordant = _mm512_setzero_si512(), in_both = discordant;
        for (Index w = 0; w < words; ++w) {
            const __m512i both = _mm512_and_si512(_mm512_load_si512(untied_i + w), _mm512_load_si512(untied_j + w));
            const __m512i less_in_one = _mm512_xor_si512(_mm512_load_si512(less_i + w), _mm512_load_si512(less_j + w));
            in_both = _mm512_add_epi64(in_both, _mm512_popcnt_epi64(both));
            discordant = _mm512_add_epi64(discordant, _mm512_popcnt_epi64(_mm512_and_si512(less_in_one, both)));
        }
        // Both sums at once: a tile has fewer than 2^32 pairs, or the n^2 would take years.
        const Index sums = _mm512_reduce_add_epi64(_mm512_or_si512(discordant, _mm512_slli_epi64(in_both, 32)));
        counts.discordant[i * models + j] += sums & 0xffffffff;
        counts.tied_in_both[i * models + j] += sums >> 32;
    }
};

#endif

typedef double Two __attribute__((vector_size(16)));  // two divisions at once

template <class T, class MakeCount>
void taus_by(const MakeCount &make_count, const T *scores, Index models, Index prompts, Index n, Index threads,
             double *taus) {
    run_parallel(prompts, threads, [=](Queue &queue) {
        auto count = make_count();
        Counts counts(models);
        std::vector<double> roots(models);
        const Index total = n * (n - 1) / 2;
        for (Index prompt; queue.take(prompt);) {
            double *out = taus + prompt * models * models;
            for (auto *sums : {&counts.tied, &counts.tied_in_both, &counts.discordant}) std::fill(sums->begin(), sums->end(), 0);
            count(scores, prompt, counts);
            // A root is 0 where a model is constant or n < 2, and then 0 / 0 is the NaN that says undefined.
            for (Index i = 0; i < models; ++i) {
                roots[i] = std::sqrt(total - counts.tied[i]);
                out[i * models + i] = roots[i] / roots[i];
                for (Index j = 0; j < i; ++j) {
                    const Index pair = i * models + j;
                    const double difference = total - counts.tied[i] - counts.tied[j] + counts.tied_in_both[pair] -
                                              2 * counts.discordant[pair];
                    // Two divisions, first by x's root, then clipped: as scipy does it, to the last bit. That bit can
                    // depend on which of the two is x.
                    const Two first = {roots[i], roots[j]}, second = {roots[j], roots[i]};
                    const Two tau = Two{difference, difference} / first / second;
                    out[i * models + j] = std::clamp(tau[0], -1.0, 1.0);
                    out[j * models + i] = std::clamp(tau[1], -1.0, 1.0);
                }
            }
        }
    });
}

}  // namespace

template <class T>
void all_taus(const T *scores, Index models, Index prompts, Index n, Path path, Index threads, double *taus) {
    // Nanoseconds on a Zen 4 core, from 2 to 32 models; AVX-512 on a Xeon. Their ratio decides, and changes less from CPU to CPU.
    const double pairs = models * (models - 1) / 2, bytes = sizeof(T), size = n;
    const double sorting = models * bytes * (100 + 1.2 * size) + pairs * size * (1.4 + 0.9 * std::log2(size / 32 + 2));
    const double with_avx2 = models * (50 + 0.006 * bytes * size * size) + pairs * (10 + 0.005 * size * size);
    const double comparing = with_avx2 * (fastest_path() == Path::avx512 ? 0.5 : 1);
    if (path == Path::automatic) path = comparing < sorting ? fastest_path() : Path::portable;
    const auto threads_for = [&](double nanoseconds) { return count_threads(threads, prompts * nanoseconds); };
    const auto run = [=](const auto &make_count, Index crew) { taus_by(make_count, scores, models, prompts, n, crew, taus); };
#if HAS_X86_CODE
    if (path == Path::avx512) return run([=] { return CountMasks<T>(models, prompts, n); }, threads_for(comparing));
    if (path == Path::avx2) return run([=] { return CountAllPairs<T>(models, prompts, n); }, threads_for(comparing));
#endif
    const Index all = threads_for(sorting), outer = all <= prompts ? all : 1;  // few long rankings: threads within a prompt
    run([=] { return CountBySorting<T>(models, prompts, n, all / outer); }, outer);
}

template void all_taus(const float *, Index, Index, Index, Path, Index, double *);
template void all_taus(const double *, Index, Index, Index, Path, Index, double *);
