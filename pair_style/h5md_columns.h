// The per-atom quantities of a frame: what they are, where LAMMPS keeps them, and their values on
// rank 0 in the order of atom IDs.

#ifndef LMP_HLGAUSS_H5MD_COLUMNS_H
#define LMP_HLGAUSS_H5MD_COLUMNS_H

#include "pointers.h"

#include "h5md_file.h"

#include <string>
#include <vector>

namespace LAMMPS_NS {

class Compute;
class Fix;
class Pair;

class H5MDColumns : protected Pointers {
public:
  /// words: the columns as in the input script; ID and (with type) species are added.
  H5MDColumns(LAMMPS *, int group, int float_type, int num_words, char **words);

  int size() const { return static_cast<int>(columns.size()); }

  /// Find the computes, fixes and variables again: they may have been replaced since.
  /// interval: steps between frames, which fixes must have values for; 0 if it changes.
  void resolve(int interval);

  /// What the file is told about the columns; valid as long as this object.
  std::vector<hlgauss_h5md_column> describe();

  /// Tell the computes that their values are wanted on a step.
  void announce(bigint step);

  /// Find out where the values are on this step, and evaluate them if need be.
  /// scheduled: LAMMPS must have them all. Otherwise what it does not have is written as missing;
  /// announced: the step was announced to computes, so variables may use them.
  void locate(bool scheduled, bool announced);

  /// Select and order the atoms of the frame; returns their number on rank 0.
  int64_t select_atoms();

  /// Values of column k on rank 0, (num_atoms, width) in the type of the file, until the next
  /// call; nullptr on other ranks. Every rank must call it for every column.
  const void *gather(int k);

  double memory_usage() const;

private:
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
  int igroup, float_type;
  std::vector<Column> columns;
  std::vector<int16_t> species;    // atomic number of each type, [0] unused
  bool warned_missing = false;

  std::vector<int> selected;     // owned atoms in the group
  std::vector<int> counts;       // rank 0: of each rank
  std::vector<int64_t> slots;    // rank 0: place of each gathered atom in the frame
  std::vector<char> packed, received, assembled;    // one column

  void add_column(Column);
  void add_reference(const std::string &);
  void add_compute(Column);
  void map_species();
  void locate(Column &, bool, bool);
  template <typename T> void pack(const Column &);
};

/// The pair style in use that runs one of our models; nullptr if there is none.
Pair *find_model_pair(class Force *);

}    // namespace LAMMPS_NS

#endif
