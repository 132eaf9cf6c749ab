package roce

// Addresses is for the tests outside of the package.
var Addresses = addresses
