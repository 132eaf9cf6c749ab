// Package uverbstest has what the kernels that providers' tests play have in common: the account of objects, and their events.
package uverbstest
