/* Decode only the wanted rectangle of a JPEG and resize it with an antialiased filter.
 *
 * Built on the public API of libjpeg-turbo (>= 2.0): jpeg_crop_scanline drops the columns outside
 * the rectangle before the inverse DCT, jpeg_skip_scanlines the rows above it, and the rows below
 * are never read. The Huffman codes are read by _entropy.h; the resize, in _resize.h, is Pillow's.
 *
 * Any warning of the library is an error here: the caller then asks Pillow, which has the last
 * word. Errors leave the library by longjmp and reach Python as exceptions; nothing prints, and
 * nothing ends the process.
 *
 * size(data) -> (width, height)
 * read_many(files, buffer), decode_many(files, buffer, boxes, out, done, size, bicubic)
 * decode(data, out, out_size, left, top, right, bottom, inside, flip, bicubic, simd, entropy)
 *
 * ValueError: not for this decoder (broken, CMYK, 12 bits ...). OverflowError: hostile.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jpeglib.h>

#include "_entropy.h"
#include "_resize.h"

#ifndef LIBJPEG_TURBO_VERSION_NUMBER
#error "libjpeg-turbo is needed: other libjpegs cannot decode a part of a picture"
#endif

enum {
    MAX_SCANS = 500,  /* more scans in one file are an attack on the decoder's time */
    /* Pixels around the rectangle where chroma has half the size: the filter looks at one, and is
     * not used at all in a picture of less than three. */
    MARGIN = 2,
    ROWS = 8          /* rows that are decoded before they are resized */
};

typedef struct {
    struct jpeg_decompress_struct cinfo;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf escape;
    int hostile;
    char message[JMSG_LENGTH_MAX];
    const uint8_t *data;
    size_t length;
    Scan *scan;       /* reads the codes in place of the library; NULL: it does that itself */
    int ours;         /* it does so */
    int unsound;      /* the codes; the library shall say in what way */
    Axis x, y;
    uint8_t *rows;    /* ROWS decoded source rows, RGBX */
    uint8_t *middle;  /* [y.last - y.first][x.out] RGBX, after the horizontal pass */
    int width, height;
} Job;

/* ---------------------------------------------------------------- errors of the library */

static void fail(j_common_ptr cinfo) {
    Job *job = cinfo->client_data;
    cinfo->err->format_message(cinfo, job->message);
    longjmp(job->escape, 1);
}

static void warn(j_common_ptr cinfo, int level) {
    if (level < 0) fail(cinfo);
}

static void quiet(j_common_ptr cinfo) { (void)cinfo; }

static void watch(j_common_ptr cinfo) {
    Job *job = cinfo->client_data;
    if (job->cinfo.input_scan_number > MAX_SCANS) {
        job->hostile = 1;
        snprintf(job->message, sizeof job->message, "more than %d scans", MAX_SCANS);
        longjmp(job->escape, 1);
    }
}

static boolean read_codes(j_decompress_ptr cinfo, JBLOCKROW *blocks) {
    Job *job = cinfo->client_data;
    if (next_mcu(job->scan, blocks)) return TRUE;
    job->unsound = 1;
    snprintf(job->message, sizeof job->message, "unsound codes");
    longjmp(job->escape, 1);
}

static void refuse(Job *job, const char *reason) {
    snprintf(job->message, sizeof job->message, "%s", reason);
    longjmp(job->escape, 1);
}

/* ---------------------------------------------------------------- decoding */

static void open_picture(Job *job) {
    job->cinfo.err = jpeg_std_error(&job->errors);
    job->errors.error_exit = fail;
    job->errors.emit_message = warn;
    job->errors.output_message = quiet;
    job->cinfo.client_data = job;
    jpeg_create_decompress(&job->cinfo);
    job->progress.progress_monitor = watch;
    job->cinfo.progress = &job->progress;
    jpeg_mem_src(&job->cinfo, (unsigned char *)job->data, (unsigned long)job->length);
    jpeg_read_header(&job->cinfo, TRUE);
    J_COLOR_SPACE space = job->cinfo.jpeg_color_space;
    if (space != JCS_YCbCr && space != JCS_GRAYSCALE && space != JCS_RGB)
        refuse(job, "neither colour nor grey");
    job->width = (int)job->cinfo.image_width;
    job->height = (int)job->cinfo.image_height;
}

/* Returns 0 with job->message set. All that is allocated hangs on `job`; see close_job. */
static int read_size(Job *job) {
    if (setjmp(job->escape)) return 0;
    open_picture(job);
    return 1;
}

/* Second half of the work: the picture is open and the weights are there. */
static int read_pixels(Job *job, int simd) {
    if (setjmp(job->escape)) return 0;
    struct jpeg_decompress_struct *cinfo = &job->cinfo;
    Axis *x = &job->x, *y = &job->y;
    cinfo->out_color_space = JCS_EXT_RGBX;
    cinfo->dct_method = JDCT_ISLOW;
    size_t codes = (size_t)(cinfo->src->next_input_byte - job->data);
    jpeg_start_decompress(cinfo);
    job->ours = job->scan && begin_scan(job->scan, cinfo, job->data, job->length, codes);
    if (job->ours) ((Entropy *)cinfo->entropy)->decode_mcu = read_codes;

    int margin = cinfo->max_h_samp_factor > 1 ? MARGIN : 0;
    int left = x->first > margin ? x->first - margin : 0;
    int right = x->last + margin < job->width ? x->last + margin : job->width;
    JDIMENSION offset = (JDIMENSION)left, width = (JDIMENSION)(right - left);
    if (left > 0 || right < job->width) jpeg_crop_scanline(cinfo, &offset, &width);
    if (job->ours) want_columns(job->scan, cinfo, offset);
    margin = cinfo->max_v_samp_factor > 1 ? MARGIN : 0;
    int top = y->first > margin ? y->first - margin : 0;
    if (top > 0) jpeg_skip_scanlines(cinfo, (JDIMENSION)top);

    /* Zero weights reach behind the last pixel: room for them, with defined content. */
    size_t stride = ((size_t)cinfo->output_width + x->taps + GROUP) * PIXEL;
    stride = (stride + 63) / 64 * 64;
    job->rows = calloc(ROWS + 1, stride);
    /* likewise below the last row */
    size_t middle_stride = (size_t)x->out * PIXEL;
    job->middle = malloc((size_t)(y->last - y->first) * middle_stride
                         + (size_t)y->taps * middle_stride);
    if (!job->rows || !job->middle) refuse(job, "out of memory");
    memset(job->middle + (size_t)(y->last - y->first) * middle_stride, 0,
           (size_t)y->taps * middle_stride);

    /* Into aligned rows the library writes past the cache, and they are read again at once. */
    JSAMPROW pointers[ROWS];
    uint8_t *unaligned = job->rows + 64 - (uintptr_t)job->rows % 64 + PIXEL;
    for (int i = 0; i < ROWS; i++) pointers[i] = unaligned + i * stride;
    while ((int)cinfo->output_scanline < y->last) {
        int row = (int)cinfo->output_scanline, count = 0;
        while (count < ROWS && row + count < y->last) { /* it gives one or two at a time */
            JDIMENSION more = jpeg_read_scanlines(cinfo, pointers + count, ROWS - count);
            if (more < 1) refuse(job, "no more rows");
            count += (int)more;
        }
        int from = row < y->first ? y->first - row : 0;
        int to = row + count > y->last ? y->last - row : count;
        uint8_t *out = job->middle + (ptrdiff_t)(row + from - y->first) * (ptrdiff_t)middle_stride;
        for (int i = from; i < to; i += TOGETHER, out += TOGETHER * middle_stride) {
            int some = to - i < TOGETHER ? to - i : TOGETHER;
            shrink_rows(x, pointers + i, some, (int)offset, out, middle_stride, simd);
        }
    }
    return 1;
}

/* read_pixels, by the library alone where the codes are not sound. */
static int read_crop(Job *job, int simd) {
    if (read_pixels(job, simd)) return 1;
    if (!job->unsound) return 0;
    jpeg_destroy_decompress(&job->cinfo);
    free(job->rows);
    free(job->middle);
    job->rows = job->middle = NULL;
    job->scan = NULL;
    return read_size(job) && read_pixels(job, simd);
}

static void close_job(Job *job) {
    jpeg_destroy_decompress(&job->cinfo);
    free_axis(&job->x);
    free_axis(&job->y);
    free(job->rows);
    free(job->middle);
    free(job);
}

/* ---------------------------------------------------------------- Python */

static PyObject *raise_for(const Job *job) {
    PyErr_SetString(job->hostile ? PyExc_OverflowError : PyExc_ValueError, job->message);
    return NULL;
}

static PyObject *py_size(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*:size", &data)) return NULL;
    Job *job = calloc(1, sizeof *job);
    PyObject *result = NULL;
    if (!job) {
        PyErr_NoMemory();
    } else {
        job->data = data.buf;
        job->length = (size_t)data.len;
        if (read_size(job)) result = Py_BuildValue("ii", job->width, job->height);
        else raise_for(job);
        close_job(job);
    }
    PyBuffer_Release(&data);
    return result;
}

/* The next marker of [at, end) that is neither escaped data nor a restart marker, or NULL. */
static const uint8_t *find_marker(const uint8_t *at, const uint8_t *end) {
    while ((at = next_mark(at, end))) {
        if (at[1] == 0xFF) at += 1;
        else if (at[1] >= JPEG_RST0 && at[1] <= JPEG_RST0 + 7) at += 2;
        else return at;
    }
    return NULL;
}

/* One that is in no thread's hands; both under the interpreter's lock. */
static Scan *spare;

static Scan *take_scan(void) {
    Scan *scan = spare ? spare : calloc(1, sizeof *scan);
    spare = NULL;
    return scan;
}

static void give_scan(Scan *scan) {
    if (spare || !scan) {
        if (scan) free_scan(scan);
    } else {
        spare = scan;
    }
}

/* The whole of decode() without Python: 1 done, 0 failed with job->message set. */
static int run(Job *job, uint8_t *out, int size, const double box[4], int inside, int flip,
               int cubic, int simd) {
    if (!read_size(job)) return 0;
    double w = job->width, h = job->height;
    /* also false for NaN */
    int fits = box[0] >= 0 && box[0] < box[2] && box[2] <= w + 1e-6 && box[0] < w && box[1] >= 0
               && box[1] < box[3] && box[3] <= h + 1e-6 && box[1] < h;
    if (!fits) {
        snprintf(job->message, sizeof job->message, "rectangle outside the %dx%d picture",
                 job->width, job->height);
        return 0;
    }
    int x0 = inside ? (int)box[0] : 0, x1 = inside ? (int)ceil(box[2]) : job->width;
    int y0 = inside ? (int)box[1] : 0, y1 = inside ? (int)ceil(box[3]) : job->height;
    if (x1 > job->width) x1 = job->width;
    if (y1 > job->height) y1 = job->height;
    if (!make_axis(&job->x, size, box[0], box[2], x0, x1, cubic, flip, GROUP)
        || !make_axis(&job->y, size, box[1], box[3], y0, y1, cubic, 0, 2)) {
        snprintf(job->message, sizeof job->message, "out of memory");
        return 0;
    }
    if (!read_crop(job, simd)) return 0;
    shrink_columns(&job->y, job->middle, job->x.out, out, simd);
    return 1;
}

static PyObject *py_decode(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer data, out;
    int size, inside, flip, cubic, simd = WITH_AVX512, entropy = 1;
    double box[4];
    if (!PyArg_ParseTuple(args, "y*w*iddddppp|ip:decode", &data, &out, &size, &box[0], &box[1],
                          &box[2], &box[3], &inside, &flip, &cubic, &simd, &entropy))
        return NULL;
    PyObject *result = NULL;
    Job *job = NULL;
    if (size < 1 || size > 4096 || out.len != (Py_ssize_t)size * size * 3) {
        PyErr_SetString(PyExc_TypeError, "out must hold size x size x 3 bytes, size 1 to 4096");
    } else if (!(job = calloc(1, sizeof *job))) {
        PyErr_NoMemory();
    } else {
        int done;
        job->data = data.buf;
        job->length = (size_t)data.len;
        job->scan = entropy ? take_scan() : NULL;
        Scan *scan = job->scan;
        simd = find_simd(simd);
        Py_BEGIN_ALLOW_THREADS
        done = run(job, out.buf, size, box, inside, flip, cubic, simd);
        Py_END_ALLOW_THREADS
        if (done) result = PyBool_FromLong(job->ours);
        else raise_for(job);
        close_job(job);
        give_scan(scan);
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&out);
    return result;
}

/* ---------------------------------------------------------------- many files at once */

/* One file: where it is and where it goes in the buffer; its size, or zeros for one that is not for
 * decode_many. A row of an int64 array. */
typedef struct {
    int64_t file, offset, length, start, width, height;
} File;

enum { MOST_PIXELS = 89478485, LONGEST_SIDE = 65500 }; /* as in shard_tools/image_file/header.py */

/* Content of a frame header: whether shard_tools/image_file/jpeg.py calls it plain, and it is not
 * CMYK. */
static int read_plain_frame(const uint8_t *at, size_t length, File *file) {
    if (length < 9 || at[0] != 8 || (at[5] != 1 && at[5] != 3)) return 0;
    if (length != 6 + 3 * (size_t)at[5] || !memchr("\x11\x21\x22\x12\x41", at[7], 5)) return 0;
    if (at[5] == 3 && (at[10] != 0x11 || at[13] != 0x11)) return 0;
    file->height = at[1] << 8 | at[2];
    file->width = at[3] << 8 | at[4];
    return file->width > 0 && file->height > 0 && file->width <= LONGEST_SIDE
           && file->height <= LONGEST_SIDE && file->width * file->height <= MOST_PIXELS;
}

/* Whether the file is a baseline JPEG of one scan that jpeg.py accepts and calls plain; what is not
 * is for jpeg.py to judge. */
static int read_plain_header(const uint8_t *data, size_t length, File *file) {
    const uint8_t *at = data + 2, *end = data + length, *frame = NULL;
    if (length < 4 || data[0] != 0xFF || data[1] != 0xD8) return 0;
    for (;;) {
        if (end - at < 4 || at[0] != 0xFF) return 0;
        int kind = at[1], size = at[2] << 8 | at[3];
        if (size < 2 || end - at < 2 + size) return 0;
        if (kind == 0xC0 || kind == 0xC1) {
            if (frame || !read_plain_frame(at + 4, (size_t)size - 2, file)) return 0;
            frame = at + 4;
        } else if (kind == 0xDA) {
            if (!frame || size < 3 || at[4] != frame[5]) return 0;
            at = find_marker(at + 2 + size, end);
            return at && at[1] == JPEG_EOI;
        } else if (kind != 0xC4 && kind != 0xDB && kind != 0xDD && kind != 0xFE
                   && (kind < 0xE0 || kind > 0xEF)) {
            return 0;
        }
        at += 2 + size;
    }
}

/* Read a file into the buffer, or say that it is not for decode_many. */
static void read_file(File *file, uint8_t *buffer) {
    file->width = file->height = 0;
    uint8_t *to = buffer + file->start;
    for (int64_t done = 0; done < file->length;) {
        ssize_t count = pread((int)file->file, to + done, (size_t)(file->length - done),
                              (off_t)(file->offset + done));
        if (count <= 0 && !(count < 0 && errno == EINTR)) return;
        if (count > 0) done += count;
    }
    File found = *file;
    if (read_plain_header(to, (size_t)file->length, &found)) *file = found;
}

/* The rows of `files`, all inside a buffer of `room` bytes; -1 with an exception. */
static Py_ssize_t check_files(const Py_buffer *files, Py_ssize_t room) {
    const File *file = files->buf;
    Py_ssize_t count = files->len / (Py_ssize_t)sizeof *file;
    for (Py_ssize_t i = 0; i < count; i++)
        if (file[i].start < 0 || file[i].length < 0 || file[i].start > room
            || file[i].length > room - file[i].start)
            count = -2;
    if (files->len % (Py_ssize_t)sizeof *file || count < 0) {
        PyErr_SetString(PyExc_TypeError, "files: rows of 6 int64 that lie inside the buffer");
        return -1;
    }
    return count;
}

static PyObject *py_read_many(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer files, buffer;
    if (!PyArg_ParseTuple(args, "w*w*:read_many", &files, &buffer)) return NULL;
    Py_ssize_t count = check_files(&files, buffer.len);
    if (count >= 0) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++) read_file((File *)files.buf + i, buffer.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&files);
    PyBuffer_Release(&buffer);
    return count < 0 ? NULL : Py_NewRef(Py_None);
}

/* A rectangle; a row of a float64 array. */
typedef struct {
    double corners[4], inside, flip;
} Rectangle;

static PyObject *py_decode_many(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer files, buffer, boxes, out, done;
    int size, cubic;
    if (!PyArg_ParseTuple(args, "y*y*y*w*w*ip:decode_many", &files, &buffer, &boxes, &out, &done,
                          &size, &cubic))
        return NULL;
    Py_ssize_t count = check_files(&files, buffer.len), each = (Py_ssize_t)size * size * 3;
    const Rectangle *box = boxes.buf;
    uint8_t *flags = done.buf;
    if (count >= 0 && (size < 1 || size > 4096 || out.len != count * each || done.len != count
                       || boxes.len != count * (Py_ssize_t)sizeof *box)) {
        PyErr_SetString(PyExc_TypeError, "boxes, out and done need a row for each file");
        count = -1;
    }
    if (count >= 0) {
        Scan *scan = take_scan();
        int simd = find_simd(WITH_AVX512);
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < count; i++) {
            const File *file = (const File *)files.buf + i;
            Job *job = file->width ? calloc(1, sizeof *job) : NULL;
            flags[i] = 0;
            if (!job) continue;
            job->data = (const uint8_t *)buffer.buf + file->start;
            job->length = (size_t)file->length;
            job->scan = scan;
            flags[i] = (uint8_t)run(job, (uint8_t *)out.buf + i * each, size, box[i].corners,
                                    box[i].inside != 0, box[i].flip != 0, cubic, simd);
            close_job(job);
        }
        Py_END_ALLOW_THREADS
        give_scan(scan);
    }
    PyBuffer_Release(&files);
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&boxes);
    PyBuffer_Release(&out);
    PyBuffer_Release(&done);
    return count < 0 ? NULL : Py_NewRef(Py_None);
}

static PyMethodDef methods[] = {
    {"read_many", py_read_many, METH_VARARGS,
     "read_many(files, buffer)\n\nfiles: int64 rows of file descriptor, offset, length, place in "
     "the buffer, width, height, of which the last two are filled in: 0 for what is not a baseline "
     "JPEG that every decoder takes, or cannot be read."},
    {"decode_many", py_decode_many, METH_VARARGS,
     "decode_many(files, buffer, boxes, out, done, size, bicubic)\n\nAs decode() for each file "
     "that has a width. boxes: float64 rows of left, top, right, bottom, inside, flip; done: uint8, "
     "0 for a file that decode() would not take."},
    {"size", py_size, METH_VARARGS, "size(data) -> (width, height) of a JPEG"},
    {"decode", py_decode, METH_VARARGS,
     "decode(data, out, size, left, top, right, bottom, inside, flip, bicubic, simd=2, "
     "entropy=True)\n\nWrite the rectangle, resized to size x size RGB bytes, into the writable "
     "buffer `out`; whether our own reader of codes read it. simd: at most scalar loops (0), "
     "AVX2 (1) or AVX-512 (2); "
     "entropy: with our own reader of codes; the bytes are the same."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpegcrop", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpegcrop(void) { return PyModule_Create(&module); }
