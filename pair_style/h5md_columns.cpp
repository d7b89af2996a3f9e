// Finds the values of every column where LAMMPS keeps them and brings them to rank 0.

#include "h5md_columns.h"

#include "compute_hlgauss_atom.h"
#include "h5md_units.h"

#include "atom.h"
#include "comm.h"
#include "compute.h"
#include "domain.h"
#include "error.h"
#include "fix.h"
#include "force.h"
#include "group.h"
#include "input.h"
#include "memory.h"
#include "modify.h"
#include "pair.h"
#include "update.h"
#include "variable.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

using namespace LAMMPS_NS;
using namespace h5md_units;

namespace {

constexpr int SIZE_COLS = 5;    // LMP_SIZE_COLS of LAMMPS's library.h

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

Pair *LAMMPS_NS::find_model_pair(Force *force)
{
  for (const char *style : {"mliap", "hlgauss"})
    for (int n = 0; n < 16; n++) {
      int dim = 0;
      Pair *pair = force->pair_match(style, 1, n);
      if (pair && pair->extract("model_hash", dim)) return pair;
    }
  return nullptr;
}

/* ---------------------------------------------------------------------- */

H5MDColumns::H5MDColumns(LAMMPS *lmp, int group, int real_type, int num_words, char **words) :
    Pointers(lmp), igroup(group), float_type(real_type)
{
  MPI_Comm_rank(world, &me);
  MPI_Comm_size(world, &nprocs);

  // always there: who the atoms are
  Column id = {};
  id.source = Column::ID;
  id.reference = id.name = "id";
  id.type = sizeof(tagint) == 8 ? HLGAUSS_H5MD_INT64 : HLGAUSS_H5MD_INT32;
  add_column(id);

  char **expanded = nullptr;
  const int num_references =
      utils::expand_args(FLERR, num_words, words, 1, expanded, lmp);    // c_ID[*]
  const std::vector<std::string> references(expanded, expanded + num_references);
  if (expanded != words) {
    for (int k = 0; k < num_references; k++) delete[] expanded[k];
    memory->sfree(expanded);
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

void H5MDColumns::add_column(Column column)
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
void H5MDColumns::add_reference(const std::string &reference)
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
void H5MDColumns::add_compute(Column column)
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

void H5MDColumns::resolve(int interval)
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
      if (interval && interval % column.fix->peratom_freq != 0)
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

/// Atomic number of each type, from the model's elements, else from the mass, else the type itself.
void H5MDColumns::map_species()
{
  const int *elements = nullptr;
  if (Pair *pair = find_model_pair(force)) {
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

std::vector<hlgauss_h5md_column> H5MDColumns::describe()
{
  map_species();
  std::vector<hlgauss_h5md_column> list;
  for (const auto &c : columns)
    list.push_back({c.name.c_str(), c.unit.c_str(), c.note.c_str(), c.ase_origin.c_str(),
                    c.lammps_unit.c_str(), c.factor, c.width, c.type, c.observable});
  return list;
}

void H5MDColumns::announce(bigint step)
{
  for (const auto &column : columns)
    if (column.compute && column.compute->timeflag) column.compute->addstep(step);
}

/* ----------------------------------------------------------------------
   values
------------------------------------------------------------------------- */

void H5MDColumns::locate(bool scheduled, bool announced)
{
  for (auto &column : columns) locate(column, scheduled, announced);
}

void H5MDColumns::locate(Column &column, bool scheduled, bool announced)
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
    column.missing = !scheduled && ((compute->peatomflag && update->eflag_atom != now) ||
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
    column.missing = now % column.fix->peratom_freq != 0;
    if (column.missing && scheduled)
      error->all(
          FLERR,
          "fix hlgauss/h5md: fix {} has values every {} steps, but a frame is due on step {}",
          column.id, column.fix->peratom_freq, now);
    set(column.fix->vector_atom, column.fix->array_atom, column.fix->size_peratom_cols == 0);
  } else if (column.source == Column::VARIABLE) {
    column.missing = !scheduled && !announced;    // it may need what LAMMPS does not have
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

/// Rank 0 finds the place of every gathered atom when all are sorted by ID.
int64_t H5MDColumns::select_atoms()
{
  const int groupbit = group->bitmask[igroup];
  selected.clear();
  for (int i = 0; i < atom->nlocal; i++)
    if (atom->mask[i] & groupbit) selected.push_back(i);
  const int num_selected = static_cast<int>(selected.size());
  counts.resize(me == 0 ? nprocs : 0);
  MPI_Gather(&num_selected, 1, MPI_INT, counts.data(), 1, MPI_INT, 0, world);

  std::vector<tagint> tags(selected.size());
  for (size_t k = 0; k < selected.size(); k++) tags[k] = atom->tag[selected[k]];
  if (me != 0) {
    MPI_Send(tags.data(), static_cast<int>(tags.size()), MPI_LMP_TAGINT, 0, 0, world);
    return 0;
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
  return static_cast<int64_t>(n);
}

const void *H5MDColumns::gather(int k)
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
  }
  MPI_Type_free(&row_type);
  return me == 0 ? assembled.data() : nullptr;
}

/// Values of the selected atoms, in the type of the file.
template <typename T> void H5MDColumns::pack(const Column &column)
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

double H5MDColumns::memory_usage() const
{
  double bytes =
      static_cast<double>(packed.capacity() + received.capacity() + assembled.capacity());
  bytes += static_cast<double>(slots.capacity() * sizeof(int64_t));
  bytes += static_cast<double>(selected.capacity() * sizeof(int));
  for (const auto &column : columns)
    bytes += static_cast<double>(column.variable_values.capacity() * sizeof(double));
  return bytes;
}
