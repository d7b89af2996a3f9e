// Chooses when a frame is written, gathers it on rank 0 sorted by atom ID, and hands it over to
// libhlgauss_h5md.so.

#include "fix_hlgauss_h5md.h"

#include "compute_hlgauss_atom.h"
#include "library.h"

#include "atom.h"
#include "comm.h"
#include "compute.h"
#include "domain.h"
#include "error.h"
#include "force.h"
#include "group.h"
#include "input.h"
#include "lammps.h"
#include "memory.h"
#include "modify.h"
#include "pair.h"
#include "timer.h"
#include "update.h"
#include "variable.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <ctime>
#include <limits>
#include <map>
#include <numeric>

#include <sys/stat.h>
#include <unistd.h>

using namespace LAMMPS_NS;
using namespace FixConst;

namespace {

constexpr char USAGE[] = "fix ID group hlgauss/h5md N file column ... [append|overwrite] "
                         "[precision single|double] [compress gzip L]";
constexpr char LIBRARY[] = "libhlgauss_h5md.so";
constexpr size_t ERROR_SIZE = 2048;
constexpr off_t LARGEST_SCRIPT = 1 << 20;    // bytes of an input script that go into the file
constexpr int SIZE_COLS = 5;                 // LMP_SIZE_COLS of LAMMPS's library.h

/// H5MD names of the units of a LAMMPS unit style.
struct Units {
  const char *time, *length, *velocity, *force, *energy, *mass, *charge;
  double force_factor;         // unit of `force` per LAMMPS unit
  const char *lammps_force;    // "" if the same
};

// MDAnalysis knows forces in kJ/mol/Angstrom and refuses files with eV/Angstrom
const std::map<std::string, Units> UNITS = {
    {"metal",
     {"ps", "Angstrom", "Angstrom ps-1", "kJ mol-1 Angstrom-1", "eV", "u", "e", 96.48533212331,
      "eV Angstrom-1"}},
    {"real",
     {"fs", "Angstrom", "Angstrom fs-1", "kcal mol-1 Angstrom-1", "kcal mol-1", "u", "e", 1.0, ""}},
    {"si", {"s", "m", "m s-1", "N", "J", "kg", "C", 1.0, ""}},
    {"cgs", {"s", "cm", "cm s-1", "dyn", "erg", "g", "statC", 1.0, ""}},
    {"electron", {"fs", "Bohr", "Bohr atu-1", "Hartree Bohr-1", "Hartree", "u", "e", 1.0, ""}},
    {"micro", {"us", "um", "um us-1", "pg um us-2", "pg um2 us-2", "pg", "pC", 1.0, ""}},
    {"nano", {"ns", "nm", "nm ns-1", "ag nm ns-2", "ag nm2 ns-2", "ag", "e", 1.0, ""}},
};
const Units NO_UNITS = {"", "", "", "", "", "", "", 1.0, ""};

const Units &units_of(const char *style)
{
  const auto found = UNITS.find(style);
  return found == UNITS.end() ? NO_UNITS : found->second;
}

// standard atomic weights, H to U (IUPAC 2021, abridged)
constexpr double ATOMIC_WEIGHTS[] = {
    1.008,  4.0026, 6.94,   9.0122, 10.81,  12.011, 14.007, 15.999, 18.998, 20.180, 22.990, 24.305,
    26.982, 28.085, 30.974, 32.06,  35.45,  39.95,  39.098, 40.078, 44.956, 47.867, 50.942, 51.996,
    54.938, 55.845, 58.933, 58.693, 63.546, 65.38,  69.723, 72.630, 74.922, 78.971, 79.904, 83.798,
    85.468, 87.62,  88.906, 91.224, 92.906, 95.95,  97,     101.07, 102.91, 106.42, 107.87, 112.41,
    114.82, 118.71, 121.76, 127.60, 126.90, 131.29, 132.91, 137.33, 138.91, 140.12, 140.91, 144.24,
    145,    150.36, 151.96, 157.25, 158.93, 162.50, 164.93, 167.26, 168.93, 173.05, 174.97, 178.49,
    180.95, 183.84, 186.21, 190.23, 192.22, 195.08, 196.97, 200.59, 204.38, 207.2,  208.98, 209,
    210,    222,    223,    226,    227,    232.04, 231.04, 238.03};

/// Atomic number whose weight is nearest to `mass`, 0 if none is near; deuterium is hydrogen.
int nearest_element(double mass)
{
  const auto nearest =
      std::min_element(std::begin(ATOMIC_WEIGHTS), std::end(ATOMIC_WEIGHTS),
                       [&](double a, double b) { return fabs(a - mass) < fabs(b - mass); });
  if (fabs(*nearest - mass) > 1.1) return 0;
  return static_cast<int>(nearest - std::begin(ATOMIC_WEIGHTS)) + 1;
}

size_t size_of(int type)
{
  switch (type) {
  case HLGAUSS_H5MD_INT16:
    return 2;
  case HLGAUSS_H5MD_INT32:
  case HLGAUSS_H5MD_FLOAT32:
    return 4;
  default:
    return 8;
  }
}

/// c_u[2] -> c_u_2
std::string name_of_reference(std::string reference)
{
  std::replace(reference.begin(), reference.end(), '[', '_');
  reference.erase(std::remove(reference.begin(), reference.end(), ']'), reference.end());
  return reference;
}

/// Unit of a per-atom field, or of a well-known LAMMPS compute; "" if unknown.
std::string unit_of(const std::string &name, const Units &units)
{
  if (!units.length[0]) return "";
  if (name == "entropy" || name == "excess_entropy" || name == "force_entropy") return "nat";
  if (name == "distance") return "1";
  if (name == "energy" || name == "energy_std" || name == "pe/atom" || name == "ke/atom")
    return units.energy;
  if (name == "force_std") return units.lammps_force[0] ? units.lammps_force : units.force;
  return "";
}

/// Copies whole rows from `source` to their places in `target`; SIZE is known to the compiler.
template <size_t SIZE>
void scatter_rows(const char *source, const int64_t *slots, size_t count, char *target)
{
  for (size_t k = 0; k < count; k++) memcpy(target + slots[k] * SIZE, source + k * SIZE, SIZE);
}

void scatter(size_t size, const char *source, const int64_t *slots, size_t count, char *target)
{
  switch (size) {
  case 2:
    return scatter_rows<2>(source, slots, count, target);
  case 4:
    return scatter_rows<4>(source, slots, count, target);
  case 8:
    return scatter_rows<8>(source, slots, count, target);
  case 12:
    return scatter_rows<12>(source, slots, count, target);
  case 24:
    return scatter_rows<24>(source, slots, count, target);
  default:
    for (size_t k = 0; k < count; k++) memcpy(target + slots[k] * size, source + k * size, size);
  }
}

}    // namespace

/* ----------------------------------------------------------------------
   entry points of the HDF5 library, which only rank 0 opens
------------------------------------------------------------------------- */

struct FixHLGaussH5MD::Library {
  decltype(&hlgauss_h5md_interface) interface = nullptr;
  decltype(&hlgauss_h5md_check) check = nullptr;
  decltype(&hlgauss_h5md_open) open = nullptr;
  decltype(&hlgauss_h5md_begin_frame) begin_frame = nullptr;
  decltype(&hlgauss_h5md_write_column) write_column = nullptr;
  decltype(&hlgauss_h5md_end_frame) end_frame = nullptr;
  decltype(&hlgauss_h5md_close) close = nullptr;

  /// False with one line in `error` if the library is missing or of another build.
  bool load(std::string &error)
  {
    void *handle = HLGauss::open_beside_plugin(LIBRARY, error);
    const auto find = [&](auto &pointer, const char *symbol) {
      if (!handle) return false;
      pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(
          HLGauss::find_symbol(handle, symbol, error));
      return pointer != nullptr;
    };
    if (!find(interface, "hlgauss_h5md_interface")) return false;
    if (interface() != HLGAUSS_H5MD_INTERFACE) {
      error = std::string(LIBRARY) + " is of another build; reinstall lmp-hl";
      return false;
    }
    return find(check, "hlgauss_h5md_check") && find(open, "hlgauss_h5md_open") &&
           find(begin_frame, "hlgauss_h5md_begin_frame") &&
           find(write_column, "hlgauss_h5md_write_column") &&
           find(end_frame, "hlgauss_h5md_end_frame") && find(close, "hlgauss_h5md_close");
  }
};

/* ---------------------------------------------------------------------- */

FixHLGaussH5MD::FixHLGaussH5MD(LAMMPS *lmp, int narg, char **arg) :
    Fix(lmp, narg, arg), interval(0), mode(HLGAUSS_H5MD_NEW), compress(0),
    float_type(HLGAUSS_H5MD_FLOAT32), file(nullptr), opened(false), last_step(INT64_MIN),
    timeout_step(-1), warned_missing(false)
{
  MPI_Comm_rank(world, &me);
  MPI_Comm_size(world, &nprocs);
  if (narg < 6) error->all(FLERR, "fix hlgauss/h5md: expected '{}'", USAGE);
  interval = utils::inumeric(FLERR, arg[3], false, lmp);
  if (interval <= 0)
    error->all(FLERR, "fix hlgauss/h5md: N must be a positive number of steps, got '{}'", arg[3]);
  filename = arg[4];
  for (int k = 0; k < narg; k++) command += (k ? " " : "fix ") + std::string(arg[k]);
  if (!atom->tag_enable) error->all(FLERR, "fix hlgauss/h5md: atoms need IDs (atom_modify id yes)");

  nevery = 1;
  dynamic_group_allow = 1;

  const auto is_keyword = [](const std::string &word) {
    return word == "append" || word == "overwrite" || word == "precision" || word == "compress";
  };
  int end = 5;
  while (end < narg && !is_keyword(arg[end])) end++;
  for (int k = end; k < narg; k++) {
    const std::string word = arg[k];
    const std::string next = k + 1 < narg ? arg[k + 1] : "";
    if (word == "append" || word == "overwrite") {
      if (mode != HLGAUSS_H5MD_NEW)
        error->all(FLERR, "fix hlgauss/h5md: give 'append' or 'overwrite' once, not both");
      mode = word == "append" ? HLGAUSS_H5MD_APPEND : HLGAUSS_H5MD_OVERWRITE;
    } else if (word == "precision") {
      if (next != "single" && next != "double")
        error->all(FLERR, "fix hlgauss/h5md: precision must be single or double, got '{}'", next);
      float_type = next == "double" ? HLGAUSS_H5MD_FLOAT64 : HLGAUSS_H5MD_FLOAT32;
      k++;
    } else if (word == "compress") {
      const std::string level = k + 2 < narg ? arg[k + 2] : "";
      if (next != "gzip" || level.size() != 1 || level < "1" || level > "9")
        error->all(FLERR,
                   "fix hlgauss/h5md: expected 'compress gzip L' with L from 1 to 9, got '{}'",
                   word + " " + next + " " + level);
      compress = level[0] - '0';
      k += 2;
    } else
      error->all(FLERR, "fix hlgauss/h5md: unknown keyword '{}' after the columns; expected '{}'",
                 word, USAGE);
  }
  if (end == 5) error->all(FLERR, "fix hlgauss/h5md: no columns given; expected '{}'", USAGE);
  parse_columns(end - 5, arg + 5);

  // fail now rather than after a long setup; the file itself is opened before the first run
  char message[ERROR_SIZE] = "";
  int failed = 0;
  if (me == 0) {
    library = std::make_unique<Library>();
    std::string reason;
    if (!library->load(reason)) {
      failed = 1;
      snprintf(message, ERROR_SIZE, "%s", reason.c_str());
    } else
      failed = library->check(filename.c_str(), mode, message, ERROR_SIZE);
  }
  stop_if(failed, message);
}

FixHLGaussH5MD::~FixHLGaussH5MD()
{
  if (!file) return;
  char message[ERROR_SIZE] = "";
  if (library->close(file, message, ERROR_SIZE))
    error->warning(FLERR, "fix hlgauss/h5md: {}", message);
}

/// Ends every rank with the message that rank 0 has.
void FixHLGaussH5MD::stop_if(int failed, const char *message)
{
  MPI_Bcast(&failed, 1, MPI_INT, 0, world);
  if (!failed) return;
  char text[ERROR_SIZE] = "";
  if (me == 0) snprintf(text, ERROR_SIZE, "%s", message);
  MPI_Bcast(text, ERROR_SIZE, MPI_CHAR, 0, world);
  error->all(FLERR, "fix hlgauss/h5md: {}", text);
}

int FixHLGaussH5MD::setmask()
{
  return END_OF_STEP | POST_RUN;
}

/* ----------------------------------------------------------------------
   columns
------------------------------------------------------------------------- */

void FixHLGaussH5MD::parse_columns(int narg, char **arg)
{
  // always there: who the atoms are
  Column id = {};
  id.source = Column::ID;
  id.reference = id.name = "id";
  id.type = sizeof(tagint) == 8 ? HLGAUSS_H5MD_INT64 : HLGAUSS_H5MD_INT32;
  add_column(id);

  char **words = nullptr;
  const int num_words = utils::expand_args(FLERR, narg, arg, 1, words, lmp);    // c_ID[*]
  const std::vector<std::string> references(words, words + num_words);
  if (words != arg) {
    for (int k = 0; k < num_words; k++) delete[] words[k];
    memory->sfree(words);
  }
  const bool has_x = std::find(references.begin(), references.end(), "x") != references.end();
  const Units &units = units_of(update->unit_style);

  for (const auto &reference : references) {
    Column column = {};
    column.reference = reference;
    column.type = float_type;
    column.id = reference;
    if (reference == "id") continue;
    if (reference == "type" || reference == "element") {
      const bool known = std::any_of(columns.begin(), columns.end(),
                                     [](const Column &c) { return c.source == Column::SPECIES; });
      if (!known) {
        Column kind = column;
        kind.source = Column::SPECIES;
        kind.name = "species";
        kind.type = HLGAUSS_H5MD_INT16;
        kind.ase_origin = "";
        add_column(kind);
      }
      if (reference == "element") continue;
      column.source = Column::TYPE;
      column.name = "type";
      column.type = HLGAUSS_H5MD_INT32;
    } else if (reference == "mass") {
      column.source = Column::MASS;
      column.name = "mass";
      column.unit = units.mass;
      column.ase_origin = "";
    } else if (reference == "xu") {
      column.source = Column::UNWRAPPED;
      column.name = has_x ? "position_unwrapped" : "position";
      column.unit = units.length;
      column.width = 3;
      if (!has_x) {
        column.ase_origin = "";
        column.observable = false;
      }
    } else if (reference == "image") {
      column.source = Column::IMAGE;
      column.name = "image";
      column.type = HLGAUSS_H5MD_INT32;
      column.width = 3;
    } else if (reference == "x" || reference == "v" || reference == "f" || reference == "q") {
      if (reference == "q" && !atom->q_flag)
        error->all(FLERR, "fix hlgauss/h5md: this atom_style has no charges 'q'");
      column.source = Column::ATTRIBUTE;
      column.observable = reference == "q";
      column.width = reference == "q" ? 1 : 3;
      column.ase_origin = "";
      if (reference == "x") {
        column.name = "position";
        column.unit = units.length;
      } else if (reference == "v") {
        // ZnH5MD would take velocities and forces for ASE's own units, whatever `unit` says
        column.name = "velocity";
        column.unit = units.velocity;
        column.ase_origin = "info";
      } else if (reference == "f") {
        column.name = "force";
        column.unit = units.force;
        column.factor = units.force_factor;
        column.lammps_unit = units.lammps_force;
        column.ase_origin = "info";
      } else {
        column.name = "charge";
        column.unit = units.charge;
      }
    } else {
      add_reference(reference);
      continue;
    }
    add_column(column);
  }
}

void FixHLGaussH5MD::add_column(Column column)
{
  const auto taken = [&](const std::string &name) {
    return name == "box" || std::any_of(columns.begin(), columns.end(),
                                        [&](const Column &other) { return other.name == name; });
  };
  for (const auto &other : columns)
    if (other.reference == column.reference && other.source == column.source &&
        other.index == column.index)
      error->all(FLERR, "fix hlgauss/h5md: column '{}' is given twice", column.reference);
  if (taken(column.name)) column.name = name_of_reference(column.reference);
  if (taken(column.name))
    error->all(FLERR, "fix hlgauss/h5md: two columns would be called '{}'", column.name);
  columns.push_back(column);
}

/// c_ID, c_ID[i], f_ID, f_ID[i], v_name, a per-atom property of LAMMPS, or one of fix
/// property/atom.
void FixHLGaussH5MD::add_reference(const std::string &reference)
{
  Column column = {};
  column.reference = reference;
  column.name = name_of_reference(reference);
  column.type = float_type;

  std::string stem = reference;
  const auto bracket = reference.find('[');
  if (bracket != std::string::npos) {
    const std::string number = reference.substr(bracket + 1, reference.size() - bracket - 2);
    if (reference.back() != ']' || !utils::is_integer(number) || atoi(number.c_str()) < 1)
      error->all(FLERR, "fix hlgauss/h5md: cannot read column '{}'", reference);
    column.index = atoi(number.c_str());
    stem = reference.substr(0, bracket);
  }
  const std::string prefix = stem.substr(0, 2);
  column.id = stem.size() > 2 ? stem.substr(2) : "";

  if (prefix == "c_") {
    column.source = Column::COMPUTE;
    return add_compute(column);
  }
  if (prefix == "f_") {
    column.source = Column::FIX;
    const Fix *source = modify->get_fix_by_id(column.id);
    if (!source) error->all(FLERR, "fix hlgauss/h5md: there is no fix '{}'", column.id);
    if (!source->peratom_flag)
      error->all(FLERR, "fix hlgauss/h5md: fix {} has no per-atom values", column.id);
    if (column.index > std::max(0, source->size_peratom_cols))
      error->all(FLERR, "fix hlgauss/h5md: fix {} has {} columns, got '{}'", column.id,
                 source->size_peratom_cols, reference);
    if (!column.index && source->size_peratom_cols) column.width = source->size_peratom_cols;
    return add_column(column);
  }
  if (prefix == "v_") {
    column.source = Column::VARIABLE;
    const int variable = input->variable->find(column.id.c_str());
    if (variable < 0) error->all(FLERR, "fix hlgauss/h5md: there is no variable '{}'", column.id);
    if (!input->variable->atomstyle(variable) || column.index)
      error->all(FLERR, "fix hlgauss/h5md: variable '{}' is not of style atom", column.id);
    return add_column(column);
  }

  int is_double = 0, num_columns = 0;
  const std::string custom =
      stem.substr(stem.find('_') == std::string::npos ? 0 : stem.find('_') + 1);
  const bool names_custom =
      prefix == "i_" || prefix == "d_" || stem.substr(0, 3) == "i2_" || stem.substr(0, 3) == "d2_";
  if (names_custom) {
    if (atom->find_custom(custom.c_str(), is_double, num_columns) < 0 ||
        (is_double != 0) != (stem[0] == 'd') || (num_columns != 0) != (stem[1] == '2'))
      error->all(FLERR, "fix hlgauss/h5md: there is no custom per-atom property '{}'", stem);
    if (column.index > num_columns)
      error->all(FLERR, "fix hlgauss/h5md: {} has {} columns, got '{}'", stem, num_columns,
                 reference);
    column.source = Column::CUSTOM;
    column.id = custom;
    if (!is_double) column.type = HLGAUSS_H5MD_INT32;
    if (!column.index && num_columns) column.width = num_columns;
    return add_column(column);
  }

  column.source = Column::ATTRIBUTE;
  column.id = stem;
  const int datatype = atom->extract_datatype(stem.c_str());
  const bool is_array =
      datatype == multitype::LAMMPS_DOUBLE_2D || datatype == multitype::LAMMPS_INT_2D;
  const bool is_vector = datatype == multitype::LAMMPS_DOUBLE || datatype == multitype::LAMMPS_INT;
  num_columns = is_array ? atom->extract_size(stem.c_str(), SIZE_COLS) : 0;
  if ((!is_array && !is_vector) || !atom->extract(stem.c_str()) || (is_array && num_columns < 1) ||
      column.index > num_columns)
    error->all(
        FLERR,
        "fix hlgauss/h5md: unknown column '{}'; expected id, type, element, mass, x, xu, v, f, "
        "image, q (x, v, f, image hold three components each), a per-atom property of this "
        "atom_style, c_ID, c_ID[i], f_ID, f_ID[i], v_name, i_name or d_name",
        reference);
  if (datatype == multitype::LAMMPS_INT || datatype == multitype::LAMMPS_INT_2D)
    column.type = HLGAUSS_H5MD_INT32;
  if (!column.index && is_array) column.width = num_columns;
  add_column(column);
}

/// A compute's vector, one column, or all columns of its array; those of hlgauss/atom by their
/// names.
void FixHLGaussH5MD::add_compute(Column column)
{
  Compute *compute = modify->get_compute_by_id(column.id);
  if (!compute) error->all(FLERR, "fix hlgauss/h5md: there is no compute '{}'", column.id);
  if (!compute->peratom_flag)
    error->all(FLERR, "fix hlgauss/h5md: compute {} has no per-atom values", column.id);
  const int num_columns = compute->size_peratom_cols;
  if (column.index > num_columns)
    error->all(FLERR, "fix hlgauss/h5md: compute {} has {} columns, got '{}'", column.id,
               num_columns, column.reference);
  const Units &units = units_of(update->unit_style);
  column.unit = unit_of(compute->style, units);

  std::vector<std::string> names;
  if (strcmp(compute->style, "hlgauss/atom") == 0)
    names = static_cast<ComputeHLGaussAtom *>(compute)->field_names;
  if (names.empty()) {
    if (!column.index && num_columns) column.width = num_columns;
    return add_column(column);
  }
  const int first = column.index ? column.index : 1;
  const int last = column.index ? column.index : static_cast<int>(names.size());
  for (int k = first; k <= last; k++) {
    column.index = num_columns ? k : 0;
    column.name = names[k - 1];
    column.unit = unit_of(column.name, units);
    add_column(column);
  }
}

/// Find the computes, fixes and variables again: they may have been replaced since.
void FixHLGaussH5MD::resolve()
{
  for (auto &column : columns) {
    const auto require = [&](bool found) {
      if (!found)
        error->all(FLERR,
                   "fix hlgauss/h5md: what column '{}' names does not exist any more, or has "
                   "another size",
                   column.reference);
    };
    const int num_columns = column.index ? column.index : column.width > 1 ? column.width : 0;
    if (column.source == Column::COMPUTE) {
      column.compute = modify->get_compute_by_id(column.id);
      require(column.compute && column.compute->peratom_flag &&
              (column.index ? column.compute->size_peratom_cols >= num_columns
                            : column.compute->size_peratom_cols == num_columns ||
                                  column.compute->size_peratom_cols == column.width));
    } else if (column.source == Column::FIX) {
      column.fix = modify->get_fix_by_id(column.id);
      require(column.fix && column.fix->peratom_flag &&
              column.fix->size_peratom_cols >= num_columns);
      if (interval % column.fix->peratom_freq != 0)
        error->all(FLERR,
                   "fix hlgauss/h5md: fix {} has values every {} steps, which does not divide "
                   "N = {}",
                   column.id, column.fix->peratom_freq, interval);
    } else if (column.source == Column::VARIABLE) {
      column.variable = input->variable->find(column.id.c_str());
      require(column.variable >= 0 && input->variable->atomstyle(column.variable));
    }
  }
}

/* ----------------------------------------------------------------------
   opening the file
------------------------------------------------------------------------- */

Pair *FixHLGaussH5MD::model_pair() const
{
  for (const char *style : {"mliap", "hlgauss"})
    for (int n = 0; n < 16; n++) {
      int dim = 0;
      Pair *pair = force->pair_match(style, 1, n);
      if (pair && pair->extract("model_hash", dim)) return pair;
    }
  return nullptr;
}

/// Atomic number of each type, from the model's elements, else from the mass, else the type itself.
void FixHLGaussH5MD::map_species()
{
  const int *elements = nullptr;
  if (Pair *pair = model_pair()) {
    int dim = 0;
    elements = static_cast<const int *>(pair->extract("hlgauss_species", dim));
  }
  const std::string unit_style = update->unit_style;
  const bool has_masses = atom->mass && (unit_style == "metal" || unit_style == "real");
  species.assign(atom->ntypes + 1, 0);
  std::string by_mass, unknown;
  for (int type = 1; type <= atom->ntypes; type++) {
    int number = elements ? elements[type] : 0;
    if (number <= 0 && has_masses) {
      number = nearest_element(atom->mass[type]);
      if (number > 0) by_mass += " " + std::to_string(type);
    }
    if (number <= 0) {
      number = type;
      unknown += " " + std::to_string(type);
    }
    species[type] = static_cast<int16_t>(number);
  }
  for (auto &column : columns) {
    if (column.source != Column::SPECIES) continue;
    column.note = "atomic number";
    if (!by_mass.empty()) column.note += "; of LAMMPS types" + by_mass + " from the nearest mass";
    if (!unknown.empty()) column.note += "; the LAMMPS type itself for types" + unknown;
  }
}

/// Text of the script that is being read, and its name in `path`; both empty if it is no file.
std::string FixHLGaussH5MD::input_script(std::string &path) const
{
  std::string text;
  struct stat info;
  if (!infile || fstat(fileno(infile), &info) != 0 || !S_ISREG(info.st_mode)) return text;
  char name[1024];
  platform::guesspath(infile, name, sizeof(name));
  path = name;
  text.resize(std::min(info.st_size, LARGEST_SCRIPT));
  const auto got = pread(fileno(infile), text.data(), text.size(), 0);
  text.resize(got > 0 ? got : 0);
  return text;
}

void FixHLGaussH5MD::open_file()
{
  map_species();
  const bigint num_atoms = group->count(igroup);
  char message[ERROR_SIZE] = "";
  int failed = 0;
  if (me == 0) {
    const Units &units = units_of(update->unit_style);
    std::vector<hlgauss_h5md_column> list;
    for (const auto &c : columns)
      list.push_back({c.name.c_str(), c.unit.c_str(), c.note.c_str(), c.ase_origin.c_str(),
                      c.lammps_unit.c_str(), c.factor, c.width, c.type, c.observable});

    std::map<std::string, std::string> texts;
    texts["lammps_version"] = lmp->version;
    texts["lmp_hl_version"] = HLGAUSS_VERSION;
    texts["fix"] = command;
    texts["pair_style"] = force->pair_style ? force->pair_style : "none";
    texts["num_ranks"] = std::to_string(nprocs);
    texts["timestep"] = fmt::format("{}", update->dt);
    texts["input_script"] = input_script(texts["input_script_path"]);
    char date[32] = "";
    const time_t now = time(nullptr);
    struct tm utc;
    if (gmtime_r(&now, &utc)) strftime(date, sizeof(date), "%Y-%m-%dT%H:%M:%SZ", &utc);
    texts["date"] = date;
    if (Pair *pair = model_pair())
      for (const char *name : {"model_path", "model_hash", "model_card"}) {
        int dim = 0;
        const auto *value = static_cast<const char *>(pair->extract(name, dim));
        if (value) texts[name] = value;
      }
    std::vector<hlgauss_h5md_text> text_list;
    for (const auto &[name, value] : texts) text_list.push_back({name.c_str(), value.c_str()});

    hlgauss_h5md_settings settings = {};
    settings.path = filename.c_str();
    settings.mode = mode;
    settings.creator_version = HLGAUSS_VERSION;
    settings.unit_style = update->unit_style;
    settings.time_unit = units.time;
    settings.length_unit = units.length;
    for (int k = 0; k < 3; k++) settings.periodic[k] = domain->periodicity[k];
    settings.start_step = update->ntimestep;
    settings.from_restart = lmp->restart_ver >= 0;
    settings.num_atoms = num_atoms;
    settings.compress = compress;
    settings.num_columns = static_cast<int>(list.size());
    settings.columns = list.data();
    settings.num_texts = static_cast<int>(text_list.size());
    settings.texts = text_list.data();

    hlgauss_h5md_opened result = {};
    file = library->open(&settings, &result, message, ERROR_SIZE);
    failed = !file;
    if (file) {
      last_step = result.last_step;
      if (result.num_frames || result.num_cut)
        utils::logmesg(lmp,
                       "fix hlgauss/h5md: {} continues after {} frames; {} frames beyond step {} "
                       "were removed\n",
                       filename, result.num_frames, result.num_cut, update->ntimestep);
    }
  }
  stop_if(failed, message);
  MPI_Bcast(&last_step, 1, MPI_LMP_BIGINT, 0, world);
  opened = true;
}

/* ----------------------------------------------------------------------
   when a frame is written
------------------------------------------------------------------------- */

void FixHLGaussH5MD::init()
{
  resolve();
  if (!opened) open_file();
  request_computes();
}

/// Announce the steps of this run on which per-atom values are wanted, up to its first frame.
void FixHLGaussH5MD::request_computes()
{
  const bigint now = update->ntimestep;
  const bigint next = (now + interval - 1) / interval * interval;
  modify->addstep_compute_all(now);
  modify->addstep_compute_all(next);
  if (update->whichflag == 2) modify->addstep_compute_all(update->laststep);
  for (const Fix *halt : modify->get_fix_by_style("^halt$"))
    for (bigint step = next / halt->nevery * halt->nevery; step > now; step -= halt->nevery)
      for (const auto &column : columns)
        if (column.compute && column.compute->timeflag) column.compute->addstep(step);
}

void FixHLGaussH5MD::setup(int)
{
  timeout_step = -1;
  if (update->ntimestep % interval == 0 && update->ntimestep != last_step) write_frame(false);
}

void FixHLGaussH5MD::min_setup(int)
{
  timeout_step = -1;
  if (update->ntimestep != last_step) write_frame(false);
}

void FixHLGaussH5MD::end_of_step()
{
  // fix halt may reset the timeout in its post_run before ours
  if (timer->is_timeout()) timeout_step = update->ntimestep;
  if (update->ntimestep % interval == 0 && update->ntimestep != last_step) write_frame(true);
}

/// The frame that ended a run early, and the last one of a minimization, which has no end_of_step.
void FixHLGaussH5MD::post_run()
{
  const bool halted = timer->is_timeout() || timeout_step == update->ntimestep;
  if ((halted || update->whichflag == 2) && update->ntimestep != last_step) write_frame(false);
}

/* ----------------------------------------------------------------------
   one frame
   on_schedule: every column was announced; otherwise values that LAMMPS
   does not have on this step are written as missing
------------------------------------------------------------------------- */

void FixHLGaussH5MD::write_frame(bool on_schedule)
{
  const bigint now = update->ntimestep;
  modify->clearstep_compute();
  for (auto &column : columns) locate(column, on_schedule);
  const bigint next = now / interval * interval + interval;
  modify->addstep_compute(next);
  // the frame on which a fix halt may end the run must be complete as well
  for (const Fix *halt : modify->get_fix_by_style("^halt$"))
    for (bigint step = next / halt->nevery * halt->nevery; step > now; step -= halt->nevery)
      modify->addstep_compute(step);

  selected.clear();
  for (int i = 0; i < atom->nlocal; i++)
    if (atom->mask[i] & groupbit) selected.push_back(i);
  int num_selected = static_cast<int>(selected.size());
  counts.resize(me == 0 ? nprocs : 0);
  MPI_Gather(&num_selected, 1, MPI_INT, counts.data(), 1, MPI_INT, 0, world);

  char message[ERROR_SIZE] = "";
  int failed = 0;
  if (me == 0) {
    const auto &d = *domain;
    const double edges[9] = {d.xprd,
                             0.0,
                             0.0,
                             d.triclinic ? d.xy : 0.0,
                             d.yprd,
                             0.0,
                             d.triclinic ? d.xz : 0.0,
                             d.triclinic ? d.yz : 0.0,
                             d.zprd};
    const int64_t num_atoms = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    const double time = update->atime + (now - update->atimestep) * update->dt;
    failed =
        library->begin_frame(file, now, time, num_atoms, edges, domain->boxlo, message, ERROR_SIZE);
  }
  stop_if(failed, message);

  sort_atoms();
  for (size_t k = 0; k < columns.size(); k++)
    send_column(static_cast<int>(k), failed, message, ERROR_SIZE);
  if (me == 0 && !failed) failed = library->end_frame(file, message, ERROR_SIZE);
  stop_if(failed, message);
  last_step = now;
}

/// Find out where the values of a column are on this step, and evaluate them if need be.
void FixHLGaussH5MD::locate(Column &column, bool on_schedule)
{
  const bigint now = update->ntimestep;
  column.vector = nullptr;
  column.rows = nullptr;
  column.int_vector = nullptr;
  column.int_rows = nullptr;
  column.first = column.index ? column.index - 1 : 0;
  column.missing = false;

  const auto set = [&](const double *vector, double **rows, bool is_vector) {
    column.vector = is_vector ? vector : nullptr;
    column.rows = is_vector ? nullptr : rows;
  };
  if (column.source == Column::COMPUTE) {
    Compute *compute = column.compute;
    column.missing = !on_schedule && ((compute->peatomflag && update->eflag_atom != now) ||
                                      (compute->pressatomflag && update->vflag_atom != now));
    if (!column.missing) {
      if (!compute->is_initialized())
        error->all(FLERR, "fix hlgauss/h5md: compute {} was defined after the run began",
                   column.id);
      if (!(compute->invoked_flag & Compute::INVOKED_PERATOM)) {
        compute->compute_peratom();
        compute->invoked_flag |= Compute::INVOKED_PERATOM;
      }
      set(compute->vector_atom, compute->array_atom, compute->size_peratom_cols == 0);
    }
  } else if (column.source == Column::FIX) {
    column.missing = !on_schedule && now % column.fix->peratom_freq != 0;
    set(column.fix->vector_atom, column.fix->array_atom, column.fix->size_peratom_cols == 0);
  } else if (column.source == Column::VARIABLE) {
    // what it needs may be unavailable on a step nobody announced
    const auto halts = modify->get_fix_by_style("^halt$");
    column.missing = !on_schedule && now % interval != 0 && update->whichflag != 2 &&
                     std::none_of(halts.begin(), halts.end(),
                                  [&](const Fix *halt) { return now % halt->nevery == 0; });
    if (!column.missing) {
      column.variable_values.resize(std::max<size_t>(1, atom->nmax));
      column.vector = column.variable_values.data();
      input->variable->compute_atom(column.variable, igroup, column.variable_values.data(), 1, 0);
    }
  } else if (column.source == Column::CUSTOM) {
    int is_double = 0, num_columns = 0;
    const int k = atom->find_custom(column.id.c_str(), is_double, num_columns);
    if (k < 0)
      error->all(FLERR, "fix hlgauss/h5md: custom per-atom property '{}' is gone",
                 column.reference);
    if (is_double)
      set(num_columns ? nullptr : atom->dvector[k], num_columns ? atom->darray[k] : nullptr,
          num_columns == 0);
    else {
      column.int_vector = num_columns ? nullptr : atom->ivector[k];
      column.int_rows = num_columns ? atom->iarray[k] : nullptr;
    }
  } else if (column.source == Column::ATTRIBUTE) {
    void *data = atom->extract(column.id.c_str());
    switch (atom->extract_datatype(column.id.c_str())) {
    case multitype::LAMMPS_DOUBLE:
      column.vector = static_cast<double *>(data);
      break;
    case multitype::LAMMPS_DOUBLE_2D:
      column.rows = static_cast<double **>(data);
      break;
    case multitype::LAMMPS_INT:
      column.int_vector = static_cast<int *>(data);
      break;
    default:
      column.int_rows = static_cast<int **>(data);
    }
  }
  if (column.missing && !warned_missing && me == 0) {
    warned_missing = true;
    error->warning(FLERR,
                   "fix hlgauss/h5md: LAMMPS has no values of '{}' on step {}, which ended a run "
                   "off schedule; they are written as NaN",
                   column.reference, now);
  }
}

/// Rank 0: the place of every gathered atom when all are sorted by ID.
void FixHLGaussH5MD::sort_atoms()
{
  std::vector<tagint> tags(selected.size());
  for (size_t k = 0; k < selected.size(); k++) tags[k] = atom->tag[selected[k]];
  if (me != 0) {
    MPI_Send(tags.data(), static_cast<int>(tags.size()), MPI_LMP_TAGINT, 0, 0, world);
    return;
  }
  for (int rank = 1; rank < nprocs; rank++) {
    const size_t start = tags.size();
    tags.resize(start + counts[rank]);
    MPI_Recv(tags.data() + start, counts[rank], MPI_LMP_TAGINT, rank, 0, world, MPI_STATUS_IGNORE);
  }
  const size_t n = tags.size();
  slots.resize(n);
  const tagint largest = n ? *std::max_element(tags.begin(), tags.end()) : 0;
  if (static_cast<size_t>(largest) <= 4 * n + 1024) {    // count how many IDs lie below each
    std::vector<int64_t> below(largest + 2, 0);
    for (const tagint tag : tags) below[tag + 1] = 1;
    std::partial_sum(below.begin(), below.end(), below.begin());
    for (size_t k = 0; k < n; k++) slots[k] = below[tags[k]];
  } else {
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tags[a] < tags[b]; });
    for (size_t k = 0; k < n; k++) slots[order[k]] = static_cast<int64_t>(k);
  }
}

/// Gather one column and write it. After a failure the ranks still take part, so that none waits.
void FixHLGaussH5MD::send_column(int k, int &failed, char *message, size_t size)
{
  const Column &column = columns[k];
  switch (column.type) {
  case HLGAUSS_H5MD_INT16:
    pack<int16_t>(column);
    break;
  case HLGAUSS_H5MD_INT32:
    pack<int32_t>(column);
    break;
  case HLGAUSS_H5MD_INT64:
    pack<int64_t>(column);
    break;
  case HLGAUSS_H5MD_FLOAT32:
    pack<float>(column);
    break;
  default:
    pack<double>(column);
  }
  const size_t row = size_of(column.type) * column.width;
  MPI_Datatype row_type;
  MPI_Type_contiguous(static_cast<int>(row), MPI_BYTE, &row_type);
  MPI_Type_commit(&row_type);
  if (me != 0) {
    MPI_Send(packed.data(), static_cast<int>(selected.size()), row_type, 0, 1, world);
  } else {
    assembled.resize(slots.size() * row);
    size_t start = 0;
    for (int rank = 0; rank < nprocs; rank++) {
      const char *source = packed.data();
      if (rank != 0) {
        received.resize(std::max<size_t>(1, counts[rank] * row));
        MPI_Recv(received.data(), counts[rank], row_type, rank, 1, world, MPI_STATUS_IGNORE);
        source = received.data();
      }
      scatter(row, source, slots.data() + start, counts[rank], assembled.data());
      start += counts[rank];
    }
    if (!failed) failed = library->write_column(file, k, assembled.data(), message, size);
  }
  MPI_Type_free(&row_type);
}

/// Values of the selected atoms, in the type of the file.
template <typename T> void FixHLGaussH5MD::pack(const Column &column)
{
  const size_t width = column.width;
  const size_t n = selected.size();
  packed.resize(std::max<size_t>(1, n * width * sizeof(T)));
  T *out = reinterpret_cast<T *>(packed.data());
  const auto fill = [&](auto value) {
    for (size_t k = 0; k < n; k++) out[k] = static_cast<T>(value(selected[k]));
  };
  const auto fill_rows = [&](auto rows, double factor) {
    const size_t first = column.first;
    for (size_t k = 0; k < n; k++)
      for (size_t c = 0; c < width; c++)
        out[k * width + c] = static_cast<T>(rows[selected[k]][first + c] * factor);
  };

  if (column.missing) {
    const T nan =
        std::numeric_limits<T>::has_quiet_NaN ? std::numeric_limits<T>::quiet_NaN() : T(-1);
    std::fill_n(out, n * width, nan);
    return;
  }
  switch (column.source) {
  case Column::ID:
    return fill([&](int i) { return atom->tag[i]; });
  case Column::TYPE:
    return fill([&](int i) { return atom->type[i]; });
  case Column::SPECIES:
    return fill([&](int i) { return species[atom->type[i]]; });
  case Column::MASS:
    return fill([&](int i) { return atom->rmass ? atom->rmass[i] : atom->mass[atom->type[i]]; });
  case Column::UNWRAPPED:
    for (size_t k = 0; k < n; k++) {
      double unwrapped[3];
      domain->unmap(atom->x[selected[k]], atom->image[selected[k]], unwrapped);
      std::copy_n(unwrapped, 3, out + 3 * k);
    }
    return;
  case Column::IMAGE:
    for (size_t k = 0; k < n; k++) {
      const imageint image = atom->image[selected[k]];
      out[3 * k] = static_cast<T>((image & IMGMASK) - IMGMAX);
      out[3 * k + 1] = static_cast<T>((image >> IMGBITS & IMGMASK) - IMGMAX);
      out[3 * k + 2] = static_cast<T>((image >> IMG2BITS) - IMGMAX);
    }
    return;
  default:
    if (column.vector) return fill([&](int i) { return column.vector[i] * column.factor; });
    if (column.int_vector) return fill([&](int i) { return column.int_vector[i]; });
    if (column.rows) return fill_rows(column.rows, column.factor);
    if (column.int_rows) return fill_rows(column.int_rows, 1.0);
  }
}

double FixHLGaussH5MD::memory_usage()
{
  double bytes =
      static_cast<double>(packed.capacity() + received.capacity() + assembled.capacity());
  bytes += static_cast<double>(slots.capacity() * sizeof(int64_t));
  bytes += static_cast<double>(selected.capacity() * sizeof(int));
  for (const auto &column : columns)
    bytes += static_cast<double>(column.variable_values.capacity() * sizeof(double));
  return bytes;
}
