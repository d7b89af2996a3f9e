// Plain C interface to libhlgauss_h5md.so, the only part of lmp-hl that knows HDF5.
//
// One writer owns one H5MD file. Functions return 0 (or a pointer) on success; otherwise they
// return nonzero (or nullptr) and put one line into `error`. No exception leaves the library.

#ifndef LMP_HLGAUSS_H5MD_FILE_H
#define LMP_HLGAUSS_H5MD_FILE_H

#include <cstddef>
#include <cstdint>

#define HLGAUSS_H5MD_EXPORT __attribute__((visibility("default")))

extern "C" {

/// Changes whenever a struct or function below changes; both sides compare it before anything else.
enum { HLGAUSS_H5MD_INTERFACE = 1 };

/// What to do when the file exists.
enum hlgauss_h5md_mode { HLGAUSS_H5MD_NEW, HLGAUSS_H5MD_APPEND, HLGAUSS_H5MD_OVERWRITE };

/// Number type of a column, in memory and in the file.
enum hlgauss_h5md_type {
  HLGAUSS_H5MD_INT16,
  HLGAUSS_H5MD_INT32,
  HLGAUSS_H5MD_INT64,
  HLGAUSS_H5MD_FLOAT32,
  HLGAUSS_H5MD_FLOAT64
};

/// One per-atom quantity: the group /particles/trajectory/<name> with value, step and time.
struct hlgauss_h5md_column {
  const char *name;
  const char *unit;           // H5MD unit string; "" writes none
  const char *note;           // how the values were made; "" writes none
  const char *ase_origin;     // where ZnH5MD puts it: "arrays", "info" or "" (its own rule)
  const char *lammps_unit;    // unit LAMMPS had before `factor`; "" if unit
  double factor;              // value in file = factor * value in LAMMPS
  int width;                  // components per atom
  int type;                   // hlgauss_h5md_type
  int observable;             // 1: also hard-linked as /observables/<name>
};

/// One text about this run, stored as /parameters/runs/<k>/<name>.
struct hlgauss_h5md_text {
  const char *name;
  const char *value;
};

struct hlgauss_h5md_settings {
  const char *path;
  int mode;                       // hlgauss_h5md_mode
  const char *creator_version;    // of lmp-hl
  const char *unit_style;         // of LAMMPS
  const char *time_unit;          // "" writes none
  const char *length_unit;        // "" writes none
  int periodic[3];
  int64_t start_step;    // step this run starts from
  int from_restart;      // 1 if this LAMMPS read a restart file
  int64_t num_atoms;     // atoms in the first frame; sets the chunk size
  int compress;          // gzip level 1-9, 0 for none
  int num_columns;
  const hlgauss_h5md_column *columns;
  int num_texts;
  const hlgauss_h5md_text *texts;
};

/// What was found in the file and done to it.
struct hlgauss_h5md_opened {
  int64_t num_frames;    // frames in the file now
  int64_t num_cut;       // frames removed because they lie beyond start_step
  int64_t last_step;     // of the last frame; INT64_MIN without frames
};

HLGAUSS_H5MD_EXPORT int hlgauss_h5md_interface();

/// Would `open` be allowed to start? Changes nothing.
HLGAUSS_H5MD_EXPORT int hlgauss_h5md_check(const char *path, int mode, char *error, size_t size);

/// Create the file or append to it. A failure leaves an existing file as it was.
HLGAUSS_H5MD_EXPORT void *hlgauss_h5md_open(const hlgauss_h5md_settings *settings,
                                            hlgauss_h5md_opened *opened, char *error, size_t size);

/// Reserve the disk space of one frame; nothing is written yet, so a full disk does no harm.
/// edges: rows a, b, c of the cell; origin: its lower corner.
HLGAUSS_H5MD_EXPORT int hlgauss_h5md_begin_frame(void *file, int64_t step, double time,
                                                 int64_t num_atoms, const double *edges,
                                                 const double *origin, char *error, size_t size);

/// values: (num_atoms, width) of the column's type.
HLGAUSS_H5MD_EXPORT int hlgauss_h5md_write_column(void *file, int column, const void *values,
                                                  char *error, size_t size);

/// Make the frame visible to readers and safe against the death of this process.
HLGAUSS_H5MD_EXPORT int hlgauss_h5md_end_frame(void *file, char *error, size_t size);

/// Always frees the writer, also when it reports an error.
HLGAUSS_H5MD_EXPORT int hlgauss_h5md_close(void *file, char *error, size_t size);
}

#endif
