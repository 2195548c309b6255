/* The Huffman codes of a baseline scan, read faster than libjpeg does and only where pixels are
 * wanted (ITU-T T.81, annex F; numbers in brackets are its sections).
 *
 * libjpeg-turbo spends four fifths of a decode on the codes: it looks at eight bits at a time, takes
 * a code and its extra bits apart, and stores the coefficients of columns that are then dropped. Here
 * one look into a table gives run, value and length of most symbols; of an MCU outside the wanted
 * columns only the DC differences are kept; and where restart markers cut the scan, what has no
 * wanted MCU is not read at all.
 *
 * next_mcu stands in for the library's own reader, Entropy.decode_mcu, which has been the same from
 * libjpeg 6b to libjpeg-turbo 3.1. It gives the same coefficients or fails, and whoever called it
 * then takes the library's: what is damaged, and how, is the library's to judge.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum {
    SHORT = 9,       /* bits of a look for one code */
    LOOK = 11,       /* of a look for two AC symbols with their extra bits */
    LONGEST = 16,    /* bits of the longest code */
    MOST_EXTRA = 11, /* bits that follow a code, in a sound file of 8-bit pixels */
    BLOCK = 64,      /* coefficients */
    /* Zeros behind a piece: an MCU that begins inside it ends inside these. */
    SLACK = D_MAX_BLOCKS_IN_MCU * BLOCK * (LONGEST + MOST_EXTRA) / 8 + 16
};

/* Up to two symbols. Bits 0-5: their length with the extra bits; 8-14: the coefficients they pass;
 * 15: the block ends with them; 16-22: what the first one passes; 32-47 and 48-63: the values at
 * the end of the first and of the last. */
typedef uint64_t Look;

#define STEP 8
#define ENDS ((Look)1 << 15)
#define FIRST 16
#define VALUE 32
#define SECOND 48
#define FURTHER ((Look)BLOCK << STEP) /* passes the block: find_symbol knows */

typedef struct {
    int32_t limit[LONGEST + 1]; /* by length: the codes below it, left-aligned to LONGEST bits */
    int32_t index[LONGEST + 1]; /* by length: place of a code's symbol, less the code */
    const JHUFF_TBL *source;
    uint16_t one[1 << SHORT];   /* length << 8 | symbol; 0: a longer code */
    Look look[1 << LOOK];       /* AC only */
} Codes;

/* What libjpeg keeps to itself; see the top. */
typedef struct {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
    boolean insufficient_data;
} Entropy;

/* The next bits on top; the low six bits of `have` tell how many of them count. */
typedef struct {
    const uint8_t *at;
    uint64_t bits;
    unsigned have;
} Bits;

typedef struct {
    Codes dc[NUM_HUFF_TBLS], ac[NUM_HUFF_TBLS];
    Look behind[1 << LOOK];    /* for w bits from 1 << w on: what a second symbol adds to a look */
    const Codes *dc_of[D_MAX_BLOCKS_IN_MCU], *ac_of[D_MAX_BLOCKS_IN_MCU];
    int blocks, membership[D_MAX_BLOCKS_IN_MCU];
    int last_dc[MAX_COMPS_IN_SCAN];
    long per_row, first, last; /* MCUs: of a row, and the wanted ones [first, last] of each */
    long next, column;         /* the MCU that the library asks for next */
    long interval;             /* MCUs of a piece */
    long pieces, piece, done;  /* the open piece, or -1; MCUs of it that are read */
    size_t *start;             /* [pieces + 1] where a piece begins; ends are two bytes before */
    size_t starts;             /* room in it */
    const uint8_t *data;
    uint8_t *room;             /* the open piece without stuffed zeros */
    const uint8_t *end;
    size_t rooms;
    Bits in;
} Scan;

static const uint8_t NATURAL[BLOCK + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33,
    40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36,
    29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63, /* of a damaged block: */ 63, 63, 63, 63, 63, 63, 63, 63, 63, 63,
    63, 63, 63, 63, 63, 63};

/* ---------------------------------------------------------------- tables */

/* The value of `size` extra bits (F.2.2.1). */
static inline int extend(int extra, int size) {
    return extra - (((1 << size) - 1) & ((extra >> (size - 1) & 1) - 1));
}

/* The loop over the codes of at most `most` bits. */
#define EACH_CODE(codes, most, code, length, place)                                   \
    for (int length = 1, code = 0, place = 0; length <= (most); length++, code <<= 1) \
        for (; code < (codes)->limit[length] >> (LONGEST - length); code++, place++)

/* Looks into `width` bits at one AC symbol, of those that fit. */
static void fill_looks(const Codes *codes, int width, Look none, Look *looks) {
    for (int i = 0; i < 1 << width; i++) looks[i] = none;
    EACH_CODE(codes, width, code, length, place) {
        int symbol = codes->source->huffval[place], run = symbol >> 4, size = symbol & 15;
        int left = width - length - size;
        if (left < 0 || (size == 0 && run > 0 && run < 15)) continue;
        Look *to = looks + ((size_t)code << (width - length));
        for (int extra = 0; extra < 1 << size; extra++) {
            Look look = (Look)(length + size);
            if (symbol == 0) look |= ENDS | (Look)1 << FIRST;
            else look |= (Look)(run + 1) << STEP | (Look)(run + 1) << FIRST;
            if (size) look |= (Look)(uint16_t)extend(extra, size) << VALUE;
            for (Look *end = to + ((size_t)1 << left); to < end; to++) *to = look;
        }
    }
}

/* Looks at two AC symbols; `behind` has those at one into fewer bits. */
static void fill_pairs(Codes *codes, Look *behind) {
    for (int width = 1; width < LOOK; width++) {
        Look *looks = behind + (1 << width);
        fill_looks(codes, width, 0, looks);
        for (int i = 0; i < 1 << width; i++) { /* the first of two becomes the second */
            Look look = looks[i];
            looks[i] = (look & (((Look)1 << FIRST) - 1)) | look >> VALUE << SECOND;
        }
    }
    behind[1] = 0;
    fill_looks(codes, LOOK, FURTHER, codes->look);
    for (Look *at = codes->look, *end = at + (1 << LOOK); at < end;) {
        if (*at == FURTHER || *at & ENDS) {
            at++;
            continue;
        }
        int left = LOOK - (int)(*at & 63);
        const Look *second = behind + (1 << left);
        Look first = *at, again = first >> VALUE << SECOND;
        for (int i = 0; i < 1 << left; i++) at[i] = first + (second[i] ? second[i] : again);
        at += 1 << left;
    }
}

/* Returns 0 for a table that gives no prefix code. */
static int make_codes(Codes *codes, const JHUFF_TBL *source, Look *behind) {
    int count = 0;
    int32_t code = 0;
    codes->source = source;
    for (int n = 1; n <= LONGEST; n++, code <<= 1) {
        codes->index[n] = count - code;
        code += source->bits[n];
        count += source->bits[n];
        if (count > 256 || code > 1 << n) return 0;
        codes->limit[n] = code << (LONGEST - n);
    }
    memset(codes->one, 0, sizeof codes->one);
    EACH_CODE(codes, SHORT, short_code, length, place) {
        uint16_t *to = codes->one + ((size_t)short_code << (SHORT - length));
        for (int i = 0; i < 1 << (SHORT - length); i++)
            to[i] = (uint16_t)(length << 8 | source->huffval[place]);
    }
    if (behind) fill_pairs(codes, behind);
    return 1;
}

/* ---------------------------------------------------------------- codes */

/* At least 56 bits. */
static inline void refill(Bits *in) {
    uint64_t next;
    memcpy(&next, in->at, sizeof next);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    next = __builtin_bswap64(next);
#endif
    in->bits |= next >> (in->have & 63);
    in->at += ~in->have >> 3 & 7;
    in->have |= 56;
}

static inline void take(Bits *in, unsigned count) {
    in->bits <<= count;
    in->have -= count;
}

/* Length << 8 | symbol of the code on top (F.2.2.3); 0: there is none. */
static inline int find_code(const Bits *in, const Codes *codes) {
    int found = codes->one[in->bits >> (64 - SHORT)];
    if (found) return found;
    int32_t top = (int32_t)(in->bits >> (64 - LONGEST));
    int n = SHORT + 1;
    while (n <= LONGEST && top >= codes->limit[n]) n++;
    if (n > LONGEST) return 0;
    return n << 8 | codes->source->huffval[((top >> (LONGEST - n)) + codes->index[n]) & 255];
}

/* Take `size` extra bits, not 0 of them; their value. */
static inline int take_value(Bits *in, int size) {
    int extra = (int)(in->bits >> (64 - size));
    take(in, (unsigned)size);
    return extend(extra, size);
}

/* One AC symbol of any length: the new k, -1 at the end of the block, or -2: not sound. */
static inline int read_symbol(Bits *in, const Codes *codes, JCOEF *block, int k, int keep) {
    refill(in);
    int found = find_code(in, codes), run = found >> 4 & 15, size = found & 15;
    if (!found || size > MOST_EXTRA) return -2;
    take(in, (unsigned)found >> 8);
    if (size == 0 && run != 15) return run ? -2 : -1;
    k += run + 1;
    if (size) {
        int value = take_value(in, size);
        if (keep) block[NATURAL[k - 1]] = (JCOEF)value;
    }
    return k <= BLOCK ? k : -2;
}

/* One block (F.2.2); `block` is zero before. 0: not sound. */
__attribute__((always_inline)) static inline int read_block(
    Bits *in, const Codes *dc, const Codes *ac, int *last_dc, JCOEF *block, int keep) {
    refill(in);
    int found = find_code(in, dc), size = found & 255;
    if (!found || size > MOST_EXTRA) return 0;
    take(in, (unsigned)found >> 8);
    if (size) *last_dc = (int)((unsigned)*last_dc + (unsigned)take_value(in, size));
    if (keep) block[0] = (JCOEF)*last_dc;
    for (int k = 1;;) {
        refill(in);
        for (int turn = 0; turn < 4; turn++) { /* of LOOK bits */
            Look look = ac->look[in->bits >> (64 - LOOK)];
            int to = k + (int)(look >> STEP & 127);
            if (to >= BLOCK) { /* the block may end before the second symbol */
                k = read_symbol(in, ac, block, k, keep);
                if (k < 0) return k == -1;
                if (k == BLOCK) return 1;
                break;
            }
            take(in, look & 63);
            if (keep) block[NATURAL[k - 1 + (int)(look >> FIRST & 127)]] = (JCOEF)(look >> VALUE);
            if (look & ENDS) return 1;
            if (keep) block[NATURAL[to - 1]] = (JCOEF)(look >> SECOND);
            k = to;
        }
    }
}

/* ---------------------------------------------------------------- pieces */

/* The first 0xff of [at, end) that is not data, since no stuffed zero follows it, or NULL. */
static const uint8_t *next_mark(const uint8_t *at, const uint8_t *end) {
#ifdef __SSE2__
    const __m128i ones = _mm_set1_epi8(-1), zero = _mm_setzero_si128();
    for (; end - at > 16; at += 16) {
        __m128i here = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)at), ones);
        __m128i stuffed = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(at + 1)), zero);
        int found = _mm_movemask_epi8(_mm_andnot_si128(stuffed, here));
        if (found) return at + __builtin_ctz((unsigned)found);
    }
#endif
    for (; end - at > 1; at++)
        if (at[0] == 0xFF && at[1] != 0) return at;
    return NULL;
}

/* Where the restart markers are, up to the end of the picture. 0: not as they should be. */
static int find_pieces(Scan *scan, size_t at, size_t length, long pieces) {
    if ((size_t)pieces + 1 > scan->starts) {
        free(scan->start);
        scan->starts = (size_t)pieces + 1;
        scan->start = malloc(scan->starts * sizeof *scan->start);
        if (!scan->start) return scan->starts = 0, 0;
    }
    scan->start[0] = at;
    for (scan->pieces = 0;;) {
        const uint8_t *next = next_mark(scan->data + at, scan->data + length);
        if (!next) return 0;
        at = (size_t)(next - scan->data) + 2;
        scan->start[++scan->pieces] = at;
        if (next[1] == JPEG_EOI) return scan->pieces == pieces;
        if (next[1] != JPEG_RST0 + ((scan->pieces - 1) & 7) || scan->pieces == pieces) return 0;
    }
}

/* Copy a piece without stuffed zeros and begin to read it. 0: no memory. */
static int open_piece(Scan *scan, long piece) {
    const uint8_t *at = scan->data + scan->start[piece];
    const uint8_t *end = scan->data + scan->start[piece + 1] - 2;
    size_t needed = (size_t)(end - at) + SLACK;
    if (needed > scan->rooms) {
        free(scan->room);
        scan->rooms = needed + needed / 2;
        scan->room = malloc(scan->rooms);
        if (!scan->room) return scan->rooms = 0, 0;
    }
    uint8_t *to = scan->room;
    while (at < end) {
        const uint8_t *next = memchr(at, 0xFF, (size_t)(end - at));
        size_t count = (size_t)((next ? next + 1 : end) - at);
        memcpy(to, at, count);
        to += count;
        at += count + (next != NULL);
    }
    memset(to, 0, SLACK);
    scan->end = to;
    scan->in = (Bits){scan->room, 0, 0};
    scan->piece = piece;
    scan->done = 0;
    memset(scan->last_dc, 0, sizeof scan->last_dc);
    return 1;
}

static inline int read_blocks(Scan *scan, JBLOCKROW *blocks, int keep) {
    Bits in = scan->in; /* so that it stays in registers */
    for (int i = 0; i < scan->blocks; i++) {
        JCOEF *block = keep ? *blocks[i] : NULL;
        int *last_dc = &scan->last_dc[scan->membership[i]];
        if (!read_block(&in, scan->dc_of[i], scan->ac_of[i], last_dc, block, keep)) return 0;
    }
    scan->in = in;
    scan->done++;
    return in.at - (in.have & 63) / 8 <= scan->end;
}

/* blocks: zeros, or NULL where only the DC values are wanted. 0: not sound. */
static int read_mcu(Scan *scan, JBLOCKROW *blocks) {
    return blocks ? read_blocks(scan, blocks, 1) : read_blocks(scan, NULL, 0);
}

/* All of the open piece is read: nothing but padding may be left of it. */
static int ends_well(const Scan *scan) {
    if (scan->piece < 0 || scan->done < scan->interval) return 1;
    return (scan->end - scan->in.at) * 8 + (scan->in.have & 63) < 8;
}

/* The MCU that the library asks for; nothing is read before it is wanted. blocks: zeros, or NULL
 * where the library does not want it. 0: not sound. */
static int next_mcu(Scan *scan, JBLOCKROW *blocks) {
    long mcu = scan->next++, column = scan->column++;
    if (scan->column == scan->per_row) scan->column = 0;
    if (!blocks || column < scan->first || column > scan->last) return 1;
    long piece = mcu / scan->interval, before = mcu % scan->interval;
    if (piece != scan->piece) {
        if (!ends_well(scan) || piece >= scan->pieces || !open_piece(scan, piece)) return 0;
    }
    while (scan->done < before)
        if (!read_mcu(scan, NULL)) return 0;
    return read_mcu(scan, blocks);
}

/* Whether the scan that the library has just opened is one for next_mcu. */
static int begin_scan(Scan *scan, const struct jpeg_decompress_struct *cinfo, const uint8_t *data,
                      size_t length, size_t at) {
    if (cinfo->progressive_mode || cinfo->arith_code || cinfo->data_precision != 8
        || cinfo->comps_in_scan != cinfo->num_components
        || cinfo->comps_in_scan > MAX_COMPS_IN_SCAN || cinfo->Ss != 0 || cinfo->Se != BLOCK - 1)
        return 0;
    scan->blocks = cinfo->blocks_in_MCU;
    for (int i = 0; i < scan->blocks; i++) {
        const jpeg_component_info *part = cinfo->cur_comp_info[cinfo->MCU_membership[i]];
        const JHUFF_TBL *dc = cinfo->dc_huff_tbl_ptrs[part->dc_tbl_no];
        const JHUFF_TBL *ac = cinfo->ac_huff_tbl_ptrs[part->ac_tbl_no];
        scan->dc_of[i] = &scan->dc[part->dc_tbl_no];
        scan->ac_of[i] = &scan->ac[part->ac_tbl_no];
        scan->membership[i] = cinfo->MCU_membership[i];
        if (!dc || !ac) return 0;
    }
    for (int t = 0; t < NUM_HUFF_TBLS; t++) {
        int used = 0;
        for (int i = 0; i < scan->blocks; i++)
            used |= (scan->dc_of[i] == &scan->dc[t]) | (scan->ac_of[i] == &scan->ac[t]) << 1;
        if (used & 1 && !make_codes(&scan->dc[t], cinfo->dc_huff_tbl_ptrs[t], NULL)) return 0;
        if (used & 2 && !make_codes(&scan->ac[t], cinfo->ac_huff_tbl_ptrs[t], scan->behind))
            return 0;
    }
    long mcus = (long)cinfo->MCUs_per_row * (long)cinfo->MCU_rows_in_scan;
    scan->data = data;
    scan->per_row = cinfo->MCUs_per_row;
    scan->first = 0;
    scan->last = scan->per_row - 1;
    scan->next = scan->column = 0;
    scan->piece = -1;
    scan->interval = cinfo->restart_interval ? (long)cinfo->restart_interval : mcus;
    return find_pieces(scan, at, length, (mcus + scan->interval - 1) / scan->interval);
}

/* After jpeg_crop_scanline, which gave `left`. */
static void want_columns(Scan *scan, const struct jpeg_decompress_struct *cinfo, JDIMENSION left) {
    long wide = DCTSIZE * (cinfo->comps_in_scan == 1 ? 1 : cinfo->max_h_samp_factor);
    scan->first = (long)left / wide;
    scan->last = ((long)left + (long)cinfo->output_width - 1) / wide;
}

static void free_scan(Scan *scan) {
    free(scan->start);
    free(scan->room);
    free(scan);
}
