/* Restart markers for a JPEG that has none: the same coefficients, coded again in pieces.
 *
 * A reader that wants a rectangle finds the pieces by their markers (ITU-T T.81, B.2.1 and E.1.4)
 * and does not read the others. The coefficients pass from jpeg_read_coefficients to
 * jpeg_write_coefficients untouched, so every decoder gives the same pixels; what comes out is read
 * again and compared, coefficient by coefficient. Of the header only the Huffman tables (optimal
 * ones for the new codes) and the restart interval are replaced; all else, and what follows the end
 * of the picture, stays as it was byte for byte.
 *
 * Taken are baseline JPEGs of one scan with the sampling factors that every decoder knows. Any
 * warning of the library is a reason to leave a file alone.
 *
 * cut(data, most) -> (at most so many bytes, MCUs of a piece, "")
 *                  or (None, MCUs of a piece or 0, why it stays as it is)
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

enum {
    WIDTH = 64,      /* pixels of a piece, about */
    PIECE_BYTES = 4, /* what a piece costs: marker, padding, DC values that are no differences */
    SHARE = 50,      /* all pieces may cost one byte in so many of the file */
    LARGEST = 65535, /* MCUs of a piece */
    PIXELS = 1 << 25 /* of a picture, whose coefficients are in memory twice: 12 bytes each */
};

enum { SOI = 0xD8, EOI, SOS, DQT, DRI = 0xDD, SOF0 = 0xC0, SOF1, SOF2, DHT = 0xC4, SOF15 = 0xCF,
       APP0 = 0xE0, APP2 = 0xE2, APP15 = 0xEF, COM = 0xFE };

typedef struct {
    jmp_buf escape;
    struct jpeg_error_mgr errors;
    struct jpeg_decompress_struct in, again;
    struct jpeg_compress_struct out;
    struct jpeg_destination_mgr room; /* where `out` writes */
    const uint8_t *data;
    size_t length;
    size_t scan, codes, end; /* where SOS begins, the codes behind it, EOI */
    long declared, interval; /* MCUs of a piece: as the file says (0: it does not), of the result */
    uint8_t *coded;          /* a JPEG of the new codes */
    size_t limit;            /* bytes that the result may have */
    uint8_t *made;           /* the result */
    size_t size;
    const char *reason;      /* why there is none */
    char message[JMSG_LENGTH_MAX];
} Job;

/* ---------------------------------------------------------------- the library's errors */

static void refuse(Job *job, const char *reason) {
    job->reason = reason;
    longjmp(job->escape, 1);
}

static void fail(j_common_ptr cinfo) {
    Job *job = cinfo->client_data;
    cinfo->err->format_message(cinfo, job->message);
    refuse(job, "damaged");
}

static void warn(j_common_ptr cinfo, int level) {
    if (level < 0) fail(cinfo);
}

static void quiet(j_common_ptr cinfo) { (void)cinfo; }

/* ---------------------------------------------------------------- segments */

/* Why a frame is not for us, or NULL. at: its content. */
static const char *judge_frame(const uint8_t *at, int size) {
    if (size < 9 || at[0] != 8 || (at[5] != 1 && at[5] != 3) || size != 6 + 3 * at[5])
        return "unusual frame";
    if (!memchr("\x11\x21\x22\x12\x41", at[7], 5)) return "unusual sampling factors";
    if (at[5] == 3 && (at[10] != 0x11 || at[13] != 0x11)) return "unusual sampling factors";
    return NULL;
}

/* Find the scan and its end. */
static void read_segments(Job *job) {
    const uint8_t *data = job->data, *end = data + job->length, *at = data + 2, *frame = NULL;
    if (job->length < 4 || data[0] != 0xFF || data[1] != SOI) refuse(job, "not a JPEG");
    for (;;) {
        if (end - at < 4 || at[0] != 0xFF) refuse(job, "disorderly segments");
        int kind = at[1], size = at[2] << 8 | at[3];
        if (size < 2 || end - at < 2 + size) refuse(job, "disorderly segments");
        if (kind == SOF2) refuse(job, "progressive");
        if (kind == SOF0 || kind == SOF1) {
            if (frame) refuse(job, "unusual frame");
            frame = at + 4;
            const char *reason = judge_frame(frame, size - 2);
            if (reason) refuse(job, reason);
        } else if (kind == DRI && size == 4) {
            job->declared = at[4] << 8 | at[5];
        } else if (kind == APP2 && size > 5 && !memcmp(at + 4, "MPF", 4)) {
            refuse(job, "several pictures"); /* it says at which byte the others begin */
        } else if (kind == SOS) {
            if (!frame) refuse(job, "unusual frame");
            if (size < 3 || at[4] != frame[5]) refuse(job, "several scans");
            break;
        } else if (kind != DHT && kind != DQT && kind != COM && (kind < APP0 || kind > APP15)) {
            refuse(job, kind > SOF2 && kind <= SOF15 ? "unusual frame" : "disorderly segments");
        }
        at += 2 + size;
    }
    job->scan = (size_t)(at - data);
    at += 2 + (at[2] << 8 | at[3]);
    job->codes = (size_t)(at - data);
    for (;; at += 2) {
        at = memchr(at, 0xFF, (size_t)(end - at));
        if (!at || end - at < 2) refuse(job, "damaged");
        if (at[1] != 0 && (at[1] & ~7) != 0xD0) break;
    }
    if (at[1] != EOI) refuse(job, at[1] == 0xFF ? "disorderly segments" : "several scans");
    job->end = (size_t)(at - data);
}

/* ---------------------------------------------------------------- pieces */

/* MCUs of a piece: as many as are WIDTH pixels, or more where pieces would cost too much; rather
 * a divisor of the row, since a rectangle of pieces is then a JPEG of its own. 0: not two of them
 * would fit into a row. */
static long choose_interval(const Job *job) {
    const struct jpeg_decompress_struct *in = &job->in;
    int grey = in->num_components == 1;
    long across = DCTSIZE * (grey ? 1 : in->max_h_samp_factor);
    long down = DCTSIZE * (grey ? 1 : in->max_v_samp_factor);
    long row = ((long)in->image_width + across - 1) / across;
    long rows = ((long)in->image_height + down - 1) / down;
    long wanted = WIDTH / across, most = (long)(job->length / (SHARE * PIECE_BYTES)), best = 0;
    if (most < 1) return 0;
    long least = (row * rows + most - 1) / most;
    if (wanted < least) wanted = least;
    for (long off = 0; off <= wanted / 2 && !best; off++) {
        if (row % (wanted + off) == 0) best = wanted + off;
        else if (wanted - off >= least && row % (wanted - off) == 0) best = wanted - off;
    }
    if (!best) best = wanted;
    return 2 * best <= row && best <= LARGEST ? best : 0;
}

/* ---------------------------------------------------------------- codes */

static void ignore(j_compress_ptr cinfo) { (void)cinfo; }

static boolean no_room(j_compress_ptr cinfo) {
    refuse(cinfo->client_data, "would grow too much");
    return FALSE;
}

static void open_in(Job *job, struct jpeg_decompress_struct *in, const uint8_t *data, size_t size) {
    in->err = &job->errors;
    in->client_data = job;
    jpeg_create_decompress(in);
    jpeg_mem_src(in, (unsigned char *)data, (unsigned long)size);
    jpeg_read_header(in, TRUE);
}

/* Write `coefficients` in pieces of `interval` MCUs into job->coded; the bytes. */
static size_t write_codes(Job *job, jvirt_barray_ptr *coefficients, long interval) {
    struct jpeg_compress_struct *out = &job->out;
    out->err = &job->errors;
    out->client_data = job;
    jpeg_create_compress(out);
    job->room = (struct jpeg_destination_mgr){job->coded, job->limit, ignore, no_room, ignore};
    out->dest = &job->room;
    jpeg_copy_critical_parameters(&job->in, out);
    out->write_JFIF_header = out->write_Adobe_marker = FALSE;
    out->optimize_coding = TRUE;
    out->restart_interval = (unsigned)interval;
    for (int i = 0; i < out->num_components; i++) {
        out->comp_info[i].dc_tbl_no = job->in.comp_info[i].dc_tbl_no;
        out->comp_info[i].ac_tbl_no = job->in.comp_info[i].ac_tbl_no;
    }
    jpeg_write_coefficients(out, coefficients);
    jpeg_finish_compress(out);
    return job->limit - job->room.free_in_buffer;
}

static void append(Job *job, const uint8_t *from, size_t count) {
    memcpy(job->made + job->size, from, count);
    job->size += count;
}

/* The source's segments, with tables, interval and codes of `coded` in place of its own. */
static void splice(Job *job, size_t coded) {
    const uint8_t *at = job->data + 2, *scan = job->data + job->scan, *new = job->coded + 2;
    job->made = malloc(job->length + coded);
    if (!job->made) refuse(job, "out of memory");
    append(job, job->data, 2);
    for (size_t size; at < scan; at += size) {
        size = 2 + (size_t)(at[2] << 8 | at[3]);
        if (at[1] != DHT && at[1] != DRI) append(job, at, size);
    }
    for (size_t size; new[1] != SOS; new += size) {
        size = 2 + (size_t)(new[2] << 8 | new[3]);
        if (new[1] == DHT || new[1] == DRI) append(job, new, size);
    }
    size_t header = job->codes - job->scan, left = coded - (size_t)(new - job->coded);
    if (left < header || memcmp(new, scan, header)) refuse(job, "unusual scan");
    append(job, new, left); /* the end marker is its last */
    append(job, job->data + job->end + 2, job->length - job->end - 2);
}

/* Whether the result holds the coefficients that the source holds. */
static int same(Job *job, jvirt_barray_ptr *coefficients) {
    open_in(job, &job->again, job->made, job->size);
    jvirt_barray_ptr *found = jpeg_read_coefficients(&job->again);
    for (int i = 0; i < job->in.num_components; i++) {
        const jpeg_component_info *part = &job->in.comp_info[i];
        for (JDIMENSION row = 0; row < part->height_in_blocks; row++) {
            JBLOCKROW a = job->in.mem->access_virt_barray((j_common_ptr)&job->in, coefficients[i],
                                                          row, 1, FALSE)[0];
            JBLOCKROW b = job->again.mem->access_virt_barray((j_common_ptr)&job->again, found[i],
                                                             row, 1, FALSE)[0];
            if (memcmp(a, b, part->width_in_blocks * sizeof *a)) return 0;
        }
    }
    return 1;
}

/* Make job->made. 0: job->reason says why it stays as it is. */
static int cut(Job *job) {
    if (setjmp(job->escape)) return 0;
    jpeg_std_error(&job->errors);
    job->errors.error_exit = fail;
    job->errors.emit_message = warn;
    job->errors.output_message = quiet;
    read_segments(job);
    open_in(job, &job->in, job->data, job->length);
    if ((int64_t)job->in.image_width * job->in.image_height > PIXELS) refuse(job, "too large");
    long interval = choose_interval(job);
    if (!interval && !job->declared) refuse(job, "too small to cut");
    jvirt_barray_ptr *coefficients = jpeg_read_coefficients(&job->in);
    if (job->declared && (!interval || job->declared < 2 * interval)) {
        job->interval = job->declared;
        refuse(job, "has restart markers");
    }
    job->coded = malloc(job->limit);
    if (!job->coded) refuse(job, "out of memory");
    splice(job, write_codes(job, coefficients, interval));
    if (job->size > job->limit) refuse(job, "would grow too much");
    if (!same(job, coefficients)) refuse(job, "would change");
    job->interval = interval;
    return 1;
}

static void close_job(Job *job) {
    jpeg_destroy_compress(&job->out);
    jpeg_destroy_decompress(&job->in);
    jpeg_destroy_decompress(&job->again);
    free(job->coded);
    free(job->made);
    free(job);
}

/* ---------------------------------------------------------------- Python */

static PyObject *py_cut(PyObject *self, PyObject *args) {
    (void)self;
    Py_buffer view;
    Py_ssize_t most;
    if (!PyArg_ParseTuple(args, "y*n:cut", &view, &most)) return NULL;
    Job *job = calloc(1, sizeof *job);
    PyObject *result = NULL;
    if (job) {
        int done;
        job->data = view.buf;
        job->length = (size_t)view.len;
        job->limit = most > 0 ? (size_t)most : 1;
        Py_BEGIN_ALLOW_THREADS
        done = cut(job);
        Py_END_ALLOW_THREADS
        if (done)
            result = Py_BuildValue("y#ls", job->made, (Py_ssize_t)job->size, job->interval, "");
        else
            result = Py_BuildValue("Ols", Py_None, job->interval, job->reason);
        close_job(job);
    } else {
        PyErr_NoMemory();
    }
    PyBuffer_Release(&view);
    return result;
}

static PyMethodDef methods[] = {
    {"cut", py_cut, METH_VARARGS,
     "cut(data, most) -> (the JPEG with restart markers in at most so many bytes, MCUs between "
     "them, ''), or (None, MCUs between those that it has, why it stays as it is)"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_jpegmarkers", NULL, -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__jpegmarkers(void) { return PyModule_Create(&module); }
