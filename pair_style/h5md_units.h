// What LAMMPS's units are called in an H5MD file, and which element a mass belongs to.

#ifndef LMP_HLGAUSS_H5MD_UNITS_H
#define LMP_HLGAUSS_H5MD_UNITS_H

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <string>

namespace h5md_units {

/// H5MD names of the units of a LAMMPS unit style.
struct Units {
  const char *time, *length, *velocity, *force, *energy, *mass, *charge;
  double force_factor;         // unit of `force` per LAMMPS unit
  const char *lammps_force;    // "" if the same
};

// MDAnalysis knows forces in kJ/mol/Angstrom and refuses files with eV/Angstrom
inline const std::map<std::string, Units> UNITS = {
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
inline const Units NO_UNITS = {"", "", "", "", "", "", "", 1.0, ""};

inline const Units &units_of(const char *style)
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
inline int nearest_element(double mass)
{
  const auto nearest =
      std::min_element(std::begin(ATOMIC_WEIGHTS), std::end(ATOMIC_WEIGHTS),
                       [&](double a, double b) { return fabs(a - mass) < fabs(b - mass); });
  if (fabs(*nearest - mass) > 1.1) return 0;
  return static_cast<int>(nearest - std::begin(ATOMIC_WEIGHTS)) + 1;
}

/// Unit of a per-atom field, or of a well-known LAMMPS compute; "" if unknown.
inline std::string unit_of(const std::string &name, const Units &units)
{
  if (!units.length[0]) return "";
  // a field of a method is named after what it is: llpr_energy_std, density_force_std
  const auto ends = [&](const char *what) { return name.ends_with(what); };
  if (ends("entropy") || ends("nll")) return "nat";
  if (ends("distance") || ends("grade")) return "1";
  if (name == "energy" || ends("energy_std") || name == "pe/atom" || name == "ke/atom")
    return units.energy;
  if (ends("force_std")) return units.lammps_force[0] ? units.lammps_force : units.force;
  return "";
}

}    // namespace h5md_units

#endif
