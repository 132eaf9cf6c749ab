// Package observe is how other processes look into software NICs: at their counters, and at their packets. It has what both sides
// need, the NICs and the observers: the messages, the counters' form, the ring in shared memory that packets come through, and what
// becomes of a packet that came through it.
//
// An observer connects to the socket that other NICs meet a NIC at (or the NIC to the observer's, see EnvCapture), and sends a
// Request. The NIC answers with an Answer or a refusal. To a request for counters a memory file belongs, with a NIC in JSON. The
// request for packets brings a memory file, sealed against shrinking, that the NIC fills until either side closes the connection.
// Both sides check whatever the other one writes.
//
// The package knows nothing of a NIC's inside, and is for Linux; on other systems there is nobody to observe.
package observe

import "errors"

// EnvCapture names the environment variable that has each NIC of a process, from its first packet on, captured by an observer that
// listens at this abstract Unix socket (a name that begins with "@"). `ringside capture -- PROGRAM` sets it for the program that it
// runs. When nobody listens there any more, the NIC carries on without.
const EnvCapture = "RINGSIDE_SOFT_CAPTURE"

// ErrGone: the NIC has ended.
var ErrGone = errors.New("the software NIC has ended")

var errMessage = errors.New("no message that an observer and a software NIC of this version exchange")
