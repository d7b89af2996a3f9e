// fix hlgauss/h5md: writes atoms and any per-atom quantity to an H5MD trajectory.
//
//   fix ID group hlgauss/h5md N file column ... [append|overwrite] [precision single|double]
//                                                [compress gzip L]

#ifndef LMP_FIX_HLGAUSS_H5MD_H
#define LMP_FIX_HLGAUSS_H5MD_H

#include "fix.h"

#include "h5md_file.h"

#include <memory>

namespace LAMMPS_NS {

class Compute;
class Pair;

class FixHLGaussH5MD : public Fix {
public:
  FixHLGaussH5MD(class LAMMPS *, int, char **);
  ~FixHLGaussH5MD() override;

  int setmask() override;
  void init() override;
  void setup(int) override;
  void min_setup(int) override;
  void end_of_step() override;
  void post_run() override;
  double memory_usage() override;

private:
  struct Library;    // entry points of libhlgauss_h5md.so

  /// One quantity to write and where LAMMPS keeps it now.
  struct Column {
    enum Source {
      ID,
      TYPE,
      SPECIES,
      MASS,
      UNWRAPPED,
      IMAGE,
      ATTRIBUTE,
      CUSTOM,
      COMPUTE,
      FIX,
      VARIABLE
    };
    Source source;
    std::string reference;    // as in the input script, e.g. c_u[2]
    std::string name;         // in the file, e.g. force_std
    std::string unit;
    std::string note;
    std::string ase_origin = "arrays";
    std::string lammps_unit;
    double factor = 1.0;
    int width = 1;
    int type = HLGAUSS_H5MD_FLOAT32;
    bool observable = true;

    std::string id;    // of the compute, fix, variable or attribute
    int index = 0;     // 1-based column of an array, 0 for a vector or a whole array
    Compute *compute = nullptr;
    Fix *fix = nullptr;
    int variable = -1;
    std::vector<double> variable_values;

    // filled for every frame: a vector or rows, of doubles or integers; none for missing values
    const double *vector = nullptr;
    const double *const *rows = nullptr;
    const int *int_vector = nullptr;
    const int *const *int_rows = nullptr;
    int first = 0;    // first component of a row
    bool missing = false;
  };

  int me, nprocs;
  int interval;    // steps between frames; nevery is 1 to see a halt in any step
  std::string filename, command;
  int mode, compress, float_type;
  std::vector<Column> columns;
  std::vector<int16_t> species;    // atomic number of each type, [0] unused

  std::unique_ptr<Library> library;    // rank 0
  void *file;                          // rank 0
  bool opened;
  bigint last_step;       // of the last frame in the file
  bigint timeout_step;    // last step that ended with a timeout or fix halt
  bool warned_missing;

  std::vector<int> selected;     // owned atoms in the group
  std::vector<int> counts;       // rank 0: of each rank
  std::vector<int64_t> slots;    // rank 0: place of each gathered atom in the frame
  std::vector<char> packed, received, assembled;    // one column

  void parse_columns(int, char **);
  void add_column(Column);
  void add_reference(const std::string &);
  bool add_attribute(const std::string &);
  void add_compute(Column);
  void resolve();
  void map_species();
  Pair *model_pair() const;
  std::string input_script(std::string &) const;
  void open_file();
  void request_computes();
  void write_frame(bool);
  void locate(Column &, bool);
  void sort_atoms();
  void send_column(int, int &, char *, size_t);
  template <typename T> void pack(const Column &);
  void stop_if(int, const char *);
};

}    // namespace LAMMPS_NS

#endif
