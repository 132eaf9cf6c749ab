package softnic

import (
	"fmt"
	"os"
)

// EnvCongestion names the environment variable that switches congestion control on for connections over UDP:
//
//	RINGSIDE_SOFT_CC=on
//
// Without it a connection sends as much as its window allows, and its packets do not say that networks may mark them: it was tried
// in simulated networks, and what it costs on a real one without congestion has not been measured. The peer's connections are the
// peer's to switch.
const EnvCongestion = "RINGSIDE_SOFT_CC"

// congestionFromEnv is what the environment asks for.
func congestionFromEnv() (on bool, err error) {
	switch v := os.Getenv(EnvCongestion); v {
	case "on":
		return true, nil
	case "", "off":
		return false, nil
	default:
		return false, fmt.Errorf("%s=%q: want on or off", EnvCongestion, v)
	}
}

// notified takes a CNP. Called with port.mu held.
func (w *wireQP) notified() {
	w.q.sq.Lock()
	if w.req != nil && !w.over {
		w.req.Notify()
	}
	w.q.sq.Unlock()
}
