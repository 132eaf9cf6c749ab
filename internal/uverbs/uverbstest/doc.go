// Package uverbstest has what the kernels that providers' tests play have in common: the account of objects and their events, the memory
// that they share with the process, and the answers that do not depend on the driver.
package uverbstest
