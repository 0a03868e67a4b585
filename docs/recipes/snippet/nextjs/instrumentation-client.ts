// On every page, before anything else: what earlier pages left behind leaves now.
import "./app/relay";
